//! Sysctls of the node that programs need and that belong to no namespace: under runc a container
//! lives with the node's values, so a guest boots with them.
//!
//! They go on the guest's kernel command line (`sysctl.NAME=VALUE`, which the kernel sets before its
//! first process): with any agent, and before anything of a container runs. The list is fixed. What
//! is on it is a limit or a habit of the kernel that concerns the guest's own programs and memory
//! only. A node that changes one later changes it for later sandboxes.

use std::path::Path;

/// Which values of a sysctl are carried.
#[derive(Clone, Copy, Debug)]
enum Carried {
    /// Every number but this one, which a guest has anyway.
    Not(u64),
    /// Every number: the kernel's own goes by the memory of the machine.
    Always,
    /// Only 1, always promise memory. A guest that is told never to promise more than it has (2)
    /// could not run what the same setting lets run on a node, which is larger.
    One,
    /// A name of a file in the working directory of a process. A path or a program of the node is
    /// none of the guest's.
    FileName,
}

const SYSCTLS: [(&str, Carried); 18] = [
    ("vm.max_map_count", Carried::Not(65_530)),
    ("vm.overcommit_memory", Carried::One),
    ("fs.aio-max-nr", Carried::Not(65_536)),
    ("fs.epoll.max_user_watches", Carried::Always),
    ("fs.file-max", Carried::Always),
    ("fs.inotify.max_queued_events", Carried::Not(16_384)),
    ("fs.inotify.max_user_instances", Carried::Not(128)),
    ("fs.inotify.max_user_watches", Carried::Always),
    ("fs.nr_open", Carried::Not(1 << 20)),
    ("fs.pipe-max-size", Carried::Not(1 << 20)),
    ("kernel.core_pattern", Carried::FileName),
    ("kernel.core_uses_pid", Carried::Not(0)),
    ("kernel.keys.maxbytes", Carried::Not(20_000)),
    ("kernel.keys.maxkeys", Carried::Not(200)),
    ("kernel.pid_max", Carried::Not(32_768)),
    ("kernel.threads-max", Carried::Always),
    ("net.core.rmem_max", Carried::Not(212_992)),
    ("net.core.wmem_max", Carried::Not(212_992)),
];

/// The kernel's pattern where nobody has set one.
const CORE: &str = "core";

/// Longest name of a core dump that is carried, in bytes: the kernel's limit.
const MAX_FILE_NAME: usize = 127;

/// Parameters of the guest's kernel that give it the node's values.
pub fn kernel_params() -> Vec<String> {
    params(|name| {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        // A kernel without it is none to follow.
        std::fs::read_to_string(path).ok()
    })
}

fn params(read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let value = |(name, carried): &(&str, Carried)| {
        let value = carried.value(read(name)?.trim())?;
        Some(format!("sysctl.{name}={value}"))
    };
    SYSCTLS.iter().filter_map(value).collect()
}

impl Carried {
    /// What the guest is told, if anything. It is one word of the command line.
    fn value(self, node: &str) -> Option<String> {
        let number = || node.parse::<u64>().ok();
        let number = match self {
            Carried::Not(default) => number().filter(|value| *value != default),
            Carried::Always => number(),
            Carried::One => number().filter(|value| *value == 1),
            Carried::FileName => return Some(node.to_owned()).filter(|name| is_file_name(name)),
        };
        number.map(|value| value.to_string())
    }
}

fn is_file_name(pattern: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '%');
    (1..=MAX_FILE_NAME).contains(&pattern.len()) && pattern != CORE && pattern.chars().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str, value: &str) -> Vec<String> {
        params(|asked| (asked == name).then(|| format!("{value}\n")))
    }

    #[test]
    fn what_the_node_has_raised_the_guest_is_told() {
        assert_eq!(
            told("vm.max_map_count", "262144"),
            ["sysctl.vm.max_map_count=262144"]
        );
        assert!(told("vm.max_map_count", "65530").is_empty());
        assert_eq!(
            told("kernel.threads-max", "63000"),
            ["sysctl.kernel.threads-max=63000"]
        );
        assert!(told("vm.max_map_count", "many quiet").is_empty());
        assert!(told("kernel.panic", "1").is_empty());
    }

    #[test]
    fn memory_is_overcommitted_as_on_the_node_but_never_strictly() {
        assert_eq!(
            told("vm.overcommit_memory", "1"),
            ["sysctl.vm.overcommit_memory=1"]
        );
        assert!(told("vm.overcommit_memory", "0").is_empty());
        assert!(told("vm.overcommit_memory", "2").is_empty());
    }

    #[test]
    fn core_dumps_have_the_nodes_name_if_they_are_the_containers() {
        assert_eq!(
            told("kernel.core_pattern", "core.%e"),
            ["sysctl.kernel.core_pattern=core.%e"]
        );
        for other in [
            "core",
            "",
            "|/usr/share/apport/apport -p%p",
            "/var/crash/core.%p",
            "core %e",
            "../core",
            "@/run/coredump.socket",
        ] {
            assert!(told("kernel.core_pattern", other).is_empty(), "{other:?}");
        }
    }

    #[test]
    fn all_of_them_leave_room_on_a_command_line() {
        let most = params(|name| {
            let is_pattern = name == "kernel.core_pattern";
            Some(if is_pattern {
                "x".repeat(MAX_FILE_NAME)
            } else {
                u64::MAX.to_string()
            })
        });
        assert_eq!(most.len(), SYSCTLS.len() - 1, "overcommit is no number");
        // The kernel's line has 2048 bytes.
        assert!(most.join(" ").len() < 1024, "{most:?}");
    }
}
