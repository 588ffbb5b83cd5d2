//! Requests, exits, late answers and the machine's death in any order, 100,000 of them by chance,
//! each held against what containerd expects of a task's events: created, started, ended, deleted,
//! in this order; one exit a process; no exit of an exec that was not started; the exit of an init
//! after those of its execs; nothing of a task after its end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use super::*;
use crate::sandbox::random::Random;

const ORDERS: u64 = 100_000;
const STEPS: u64 = 24;

/// What has been told of one container since its create.
#[derive(Default)]
struct Told {
    started: BTreeSet<Option<String>>,
    exited: BTreeSet<Option<String>>,
}

/// The state, and what its owner and the guest would do with it.
struct World {
    state: State,
    creating: BTreeSet<String>,
    starting: BTreeSet<ProcessId>,
    /// In the guest, whether their start was answered or not.
    alive: BTreeSet<ProcessId>,
    told: BTreeMap<String, Told>,
    now: SystemTime,
}

impl World {
    fn exits(&mut self, exits: Vec<(ProcessId, Exit)>) {
        for (process, _) in exits {
            let told = self.told.get_mut(&process.container);
            let told = told.unwrap_or_else(|| panic!("{process} ended and was never created"));
            if !process.is_init() {
                assert!(
                    told.started.contains(&process.exec),
                    "{process} was not started"
                );
            }
            let of_init = told.exited.contains(&None);
            assert!(
                !of_init,
                "{process} ended after its init, or its init twice"
            );
            assert!(
                told.exited.insert(process.exec.clone()),
                "{process} ended twice"
            );
            if process.is_init() {
                let execs = told.started.iter().filter(|exec| exec.is_some());
                let open: Vec<_> = execs.filter(|exec| !told.exited.contains(*exec)).collect();
                assert!(open.is_empty(), "{process} ended before its execs {open:?}");
            }
        }
    }

    fn exited(&mut self, process: &ProcessId, status: u32) {
        let at = self.now;
        let exits = self.state.exited(process, Exit { pid: 0, status, at });
        self.exits(exits);
    }

    fn vm_died(&mut self) {
        let exits = self.state.vm_died("it is over", self.now);
        self.exits(exits);
    }

    fn step(&mut self, random: &mut Random) {
        let container = ["a", "b"][random.below(2)].to_owned();
        let process = ProcessId::of_request(&container, ["", "x", "y"][random.below(3)]);
        match random.below(16) {
            0 | 1 => {
                if self
                    .state
                    .create(&container, "/b", Stdio::default())
                    .is_ok()
                {
                    self.creating.insert(container);
                }
            }
            2 | 3 => {
                if let Some(id) = random.pick(&self.creating) {
                    self.creating.remove(&id);
                    if random.below(8) == 0 {
                        self.state.create_failed(&id);
                        return;
                    }
                    self.state.created(&id, 7, TaskKind::Container);
                    self.told.insert(id.clone(), Told::default());
                    self.alive.insert(ProcessId::init(&id));
                    if self.state.alive().is_err() {
                        self.vm_died();
                    }
                }
            }
            4 => drop(self.state.exec(&process, Stdio::default())),
            5 | 6 => {
                if self.state.start(&process).is_ok() {
                    self.starting.insert(process.clone());
                    if !process.is_init() {
                        self.alive.insert(process);
                    }
                }
            }
            7..=9 => {
                if let Some(process) = random.pick(&self.starting) {
                    self.starting.remove(&process);
                    self.answer_start(&process, random.below(6) == 0);
                }
            }
            10 | 11 => {
                if let Some(process) = random.pick(&self.alive) {
                    self.alive.remove(&process);
                    self.exited(&process, 3);
                }
            }
            12 => {
                let exits = self.state.release_held(&container, self.now);
                self.exits(exits);
            }
            13 | 14 => self.delete(&process),
            _ if random.below(6) == 0 => self.vm_died(),
            _ => drop(self.state.kill(&process)),
        }
    }

    fn answer_start(&mut self, process: &ProcessId, failed: bool) {
        if failed {
            self.alive.remove(process);
            let exits = self.state.start_failed(process);
            self.exits(exits);
            return;
        }
        let Ok((_, early)) = self.state.started(process) else {
            return;
        };
        let told = self.told.get_mut(&process.container);
        let told = told.unwrap_or_else(|| panic!("{process} started and was never created"));
        assert!(
            !told.exited.contains(&None),
            "{process} started after its init's end"
        );
        assert!(
            told.started.insert(process.exec.clone()),
            "{process} started twice"
        );
        if let Some(exit) = early {
            self.exited(process, exit.status);
        }
    }

    fn delete(&mut self, process: &ProcessId) {
        let Ok(exit) = self.state.delete(process) else {
            return;
        };
        let told = self.told.get_mut(&process.container);
        let told = told.unwrap_or_else(|| panic!("{process} deleted and was never created"));
        let started = told.started.contains(&process.exec);
        let exited = told.exited.contains(&process.exec);
        assert!(
            exit.is_some() || !started,
            "{process} is deleted and has no exit"
        );
        assert!(
            exited || !started,
            "{process} is deleted and its exit was never told"
        );
        self.state.deleted(process);
        self.alive.retain(|other| {
            !(other == process || (process.is_init() && other.container == process.container))
        });
        if process.is_init() {
            self.told.remove(&process.container);
            self.starting
                .retain(|other| other.container != process.container);
        } else {
            told.started.remove(&process.exec);
            told.exited.remove(&process.exec);
        }
    }

    /// Whatever was begun comes to its end, and then all has been told and can be deleted.
    fn come_to_an_end(&mut self) {
        for id in std::mem::take(&mut self.creating) {
            self.state.create_failed(&id);
        }
        for process in std::mem::take(&mut self.starting) {
            self.answer_start(&process, false);
        }
        self.vm_died();
        for (container, told) in &self.told {
            assert!(
                told.exited.contains(&None),
                "the end of {container} was never told"
            );
            let open: Vec<_> = told.started.difference(&told.exited).collect();
            assert!(
                open.is_empty(),
                "the end of {container}'s {open:?} was never told"
            );
        }
        for container in self.told.keys().cloned().collect::<Vec<_>>() {
            self.delete(&ProcessId::init(&container));
        }
        assert!(self.state.is_empty(), "a task cannot be deleted");
    }
}

#[test]
fn events_are_as_containerd_expects_in_every_order() {
    for seed in 1..=ORDERS {
        let mut random = Random::new(seed);
        let mut world = World {
            state: State::default(),
            creating: BTreeSet::new(),
            starting: BTreeSet::new(),
            alive: BTreeSet::new(),
            told: BTreeMap::new(),
            now: SystemTime::UNIX_EPOCH,
        };
        let run = std::panic::AssertUnwindSafe(|| {
            (0..STEPS).for_each(|_| world.step(&mut random));
            world.come_to_an_end();
        });
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("order {seed} of the property test");
            std::panic::resume_unwind(panic);
        }
    }
}
