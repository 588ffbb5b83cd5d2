//! The owner in any order: requests, answers of a host and a guest that come late or are refusals,
//! exits, overdue clocks and the machine's death, by chance, each order held against what containerd
//! expects of a task's events: created, started, ended, deleted, in this order; one exit a process;
//! no exit of an exec that was not started; the exit of an init after those of its execs. In the
//! end every request has its answer and nothing of a task is left.

use std::collections::{BTreeMap, BTreeSet};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecStarted, TaskExit, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use protobuf::Message;
use tokio::sync::oneshot::Receiver;

use super::tests::{Lab, work_begun};
use super::*;
use crate::model::{Freezer, ProcessId};
use crate::sandbox::double::Call;
use crate::sandbox::random::Random;

/// How many are tried where `COFFERDAM_ORDERS` does not say: `make test` says 100,000.
const ORDERS: u64 = 5_000;
const STEPS: usize = 28;

/// Halves of the orders, side by side.
const THREADS: u64 = 2;

/// What has been told of one container since its create.
#[derive(Default)]
struct Told {
    started: BTreeSet<String>,
    exited: BTreeSet<String>,
}

#[derive(Default)]
struct Containers(BTreeMap<String, Told>);

impl Containers {
    fn hear(&mut self, event: &Envelope) {
        let value = &event.event.value;
        match event.topic.as_str() {
            "/tasks/create" => {
                let event = TaskCreate::parse_from_bytes(value).unwrap();
                let before = self.0.insert(event.container_id.clone(), Told::default());
                assert!(before.is_none(), "{} created twice", event.container_id);
            }
            "/tasks/start" => {
                let id = TaskStart::parse_from_bytes(value).unwrap().container_id;
                self.started(&id, &id);
            }
            "/tasks/exec-started" => {
                let event = TaskExecStarted::parse_from_bytes(value).unwrap();
                self.started(&event.container_id, &event.exec_id);
            }
            "/tasks/exit" => self.exited(&TaskExit::parse_from_bytes(value).unwrap()),
            "/tasks/delete" => {
                let id = TaskDelete::parse_from_bytes(value).unwrap().container_id;
                let told = self.0.remove(&id);
                let told = told.unwrap_or_else(|| panic!("{id} deleted and was never created"));
                let open: Vec<_> = told.started.difference(&told.exited).collect();
                assert!(open.is_empty(), "{id} deleted, and no exit of {open:?}");
            }
            _ => {}
        }
    }

    fn of(&mut self, id: &str) -> &mut Told {
        let told = self.0.get_mut(id);
        told.unwrap_or_else(|| panic!("an event of {id}, which was never created"))
    }

    fn started(&mut self, id: &str, process: &str) {
        let told = self.of(id);
        assert!(
            !told.exited.contains(id),
            "{process} of {id} started after the end"
        );
        // An exec of a name that was deleted starts anew.
        assert!(
            told.started.insert(process.to_owned()) || told.exited.remove(process),
            "{process} of {id} started twice"
        );
    }

    fn exited(&mut self, exit: &TaskExit) {
        let (id, process) = (&exit.container_id, &exit.id);
        let told = self.of(id);
        let is_init = process == id;
        assert!(
            is_init || told.started.contains(process),
            "{process} ended and never started"
        );
        assert!(
            !told.exited.contains(id),
            "{process} ended after its init, or init twice"
        );
        assert!(
            told.exited.insert(process.clone()),
            "{process} of {id} ended twice"
        );
        if is_init {
            let open = told.started.iter().filter(|other| *other != id);
            let open: Vec<_> = open.filter(|other| !told.exited.contains(*other)).collect();
            assert!(open.is_empty(), "{id} ended before {open:?}");
        }
    }
}

/// An answer that has to come, whatever it says.
type Awaited = Box<dyn FnMut() -> bool>;

fn awaited<T: 'static>(mut answer: Receiver<Result<T>>) -> Awaited {
    let mut answered = false;
    Box::new(move || {
        answered |= answer.try_recv().is_ok();
        answered
    })
}

struct World {
    lab: Lab,
    told: Containers,
    awaited: Vec<(String, Awaited)>,
    /// Of work that is done and of which the owner has not heard.
    outcomes: Vec<Outcome>,
}

impl World {
    /// One thing happens. What follows from it may happen now, or later.
    async fn step(&mut self, random: &mut Random) {
        let id = ["a", "b"][random.below(2)].to_owned();
        let process = ProcessId::of_request(&id, ["", "x", "y"][random.below(3)]);
        match random.below(20) {
            0 | 1 => self.awaits("create", self.lab.create(&id)),
            2 | 3 => self.awaits("exec", self.lab.exec(&id, process.exec_id())),
            4..=6 => self.awaits("start", self.lab.start(process)),
            7 => self.awaits("kill", self.lab.kill(process, [9, 15][random.below(2)])),
            8 | 9 => self.awaits("delete", self.lab.delete(process)),
            10 => {
                let to = [Freezer::Frozen, Freezer::Thawed][random.below(2)];
                let asked = self.lab.ask(|reply| Request::SetFreezer {
                    container: id,
                    to,
                    reply,
                });
                self.awaits("freezer", asked);
            }
            11 => self.awaits(
                "wait",
                self.lab.ask(|reply| Request::Wait { process, reply }),
            ),
            12..=17 => self.answer(random),
            // Whatever a clock would do.
            18 => match random.below(3) {
                0 => self.lab.owner.release_held(&id),
                1 if self.lab.owner.state.is_unfinished(&id) => self.lab.owner.begin_to_end(&id),
                _ if random.below(8) == 0 => self.lab.script.die("QEMU was killed"),
                _ => {}
            },
            _ => {}
        }
        // Let what was begun run, and the owner hear of some of it, in any order.
        work_begun().await;
        let owner = &mut self.lab.owner;
        while let Some(Some(outcome)) = owner.work.join_next().now_or_never() {
            self.outcomes.push(outcome.unwrap());
        }
        for _ in 0..random.below(4) {
            if random.below(2) == 0
                && let Ok(request) = self.lab.requests.try_recv()
            {
                owner.handle(request);
            } else if !self.outcomes.is_empty() {
                let index = random.below(self.outcomes.len());
                owner.finish(self.outcomes.swap_remove(index));
            }
        }
        self.hear();
    }

    fn awaits<T: 'static>(&mut self, what: &str, answer: Receiver<Result<T>>) {
        self.awaited.push((what.to_owned(), awaited(answer)));
    }

    fn answer(&mut self, random: &mut Random) {
        let waiting = self.lab.script.waiting();
        if waiting.is_empty() {
            return;
        }
        let index = random.below(waiting.len());
        let fails = random.below(8) == 0 && !matches!(waiting[index], Call::Wait(_));
        let answer = if fails {
            Err(Error::internal("no"))
        } else {
            Ok(3)
        };
        self.lab.script.answer_one(index, answer);
    }

    fn hear(&mut self) {
        let events = self.lab.owner.events.take();
        events.iter().for_each(|event| self.told.hear(event));
    }

    /// Whatever was begun comes to its end, and then all has been told and can be deleted.
    async fn come_to_an_end(&mut self) {
        for outcome in std::mem::take(&mut self.outcomes) {
            self.lab.owner.finish(outcome);
        }
        loop {
            self.lab.settle().await;
            self.hear();
            let waiting = self.lab.script.waiting();
            let next = waiting
                .iter()
                .position(|call| !matches!(call, Call::Wait(_)));
            match next {
                Some(index) => self.lab.script.answer_one(index, Ok(0)),
                None => break,
            }
        }
        self.lab.script.die("it is over");
        self.lab.settle().await;
        self.hear();
        let tasks = self.lab.owner.state.ids();
        let told: Vec<String> = self.told.0.keys().cloned().collect();
        assert_eq!(tasks, told, "what there is, and what containerd knows");
        for id in tasks {
            let told = self.told.of(&id);
            assert!(told.exited.contains(&id), "the end of {id} was never told");
            let deleted = self.lab.delete(ProcessId::init(&id));
            self.awaits("last delete", deleted);
        }
        self.lab.settle().await;
        self.hear();
        assert!(self.lab.owner.state.is_empty(), "a task cannot be deleted");
        let kept = &self.lab.owner.runtimes;
        assert!(kept.is_empty(), "something of a task is kept: {kept:?}");
        assert!(self.told.0.is_empty(), "containerd still knows a task");
        for (what, answered) in &mut self.awaited {
            assert!(answered(), "{what} was never answered");
        }
    }
}

#[test]
fn every_order_of_requests_answers_and_deaths_is_told_as_containerd_expects() {
    let orders = std::env::var("COFFERDAM_ORDERS").map(|orders| orders.parse().unwrap());
    let orders = orders.unwrap_or(ORDERS);
    std::thread::scope(|scope| {
        for first in 1..=THREADS {
            scope.spawn(move || {
                (first..=orders)
                    .step_by(usize::try_from(THREADS).unwrap())
                    .for_each(one_order);
            });
        }
    });
}

fn one_order(seed: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let order = async {
        let mut random = Random::new(seed);
        let mut world = World {
            lab: Lab::new(|call| {
                matches!(call, Call::AddLinks | Call::AttachDisk | Call::DetachDisk)
            }),
            told: Containers::default(),
            awaited: Vec::new(),
            outcomes: Vec::new(),
        };
        for _ in 0..STEPS {
            world.step(&mut random).await;
        }
        world.come_to_an_end().await;
    };
    let run = std::panic::AssertUnwindSafe(|| runtime.block_on(order));
    if let Err(panic) = std::panic::catch_unwind(run) {
        eprintln!("order {seed} of the owner's property test");
        std::panic::resume_unwind(panic);
    }
}
