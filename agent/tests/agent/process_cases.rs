//! Who a process is, what it may do, and how it ends.

use std::time::Duration;

use guest_protocol::protocols::cofferdam::{IOPriority, Scheduler};
use guest_protocol::protocols::oci::{LinuxSeccomp, LinuxSyscall, POSIXRlimit, Spec, User};
use guest_protocol::stdio::Channel;
use tokio::io::AsyncReadExt;
use ttrpc::Code;

use super::client::{Client, DEADLINE, linux, process, refusal, strings};

fn status_fields(status: &str, names: &[&str]) -> Vec<String> {
    let field = |name: &&str| {
        let line = status.lines().find_map(|line| line.strip_prefix(*name));
        line.unwrap_or_default()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    names.iter().map(field).collect()
}

pub async fn a_process_has_user_groups_and_capabilities_as_told(client: &Client<'_>) {
    let output = client
        .script("identity", "cat /proc/self/status", |spec| {
            let process = process(spec);
            process.User = Some(User {
                UID: 33,
                GID: 44,
                AdditionalGids: vec![5, 1000],
                ..Default::default()
            })
            .into();
            let sets = process.Capabilities.mut_or_insert_default();
            sets.Inheritable = strings(&["CAP_KILL"]);
            sets.Ambient = strings(&["CAP_KILL"]);
            sets.Bounding = strings(&["CAP_KILL", "CHOWN"]);
            sets.Permitted.clone_from(&sets.Bounding);
            sets.Effective.clone_from(&sets.Bounding);
        })
        .await;
    let names = [
        "Uid:",
        "Gid:",
        "Groups:",
        "CapInh:",
        "CapPrm:",
        "CapEff:",
        "CapBnd:",
        "CapAmb:",
        "NoNewPrivs:",
        "Seccomp:",
    ];
    let kill = "0000000000000020";
    assert_eq!(
        status_fields(&output.stdout, &names),
        [
            "33 33 33 33",
            "44 44 44 44",
            "5 1000",
            kill,
            kill,
            kill,
            "0000000000000021",
            kill,
            "0",
            "0"
        ],
        "{output:?}"
    );
    let root = client
        .script("root-caps", "cat /proc/self/status", |_| {})
        .await;
    assert_eq!(
        status_fields(&root.stdout, &["CapPrm:", "CapEff:", "CapBnd:"]),
        ["00000000080020eb"; 3]
    );
}

pub async fn no_new_privileges_and_seccomp_hold(client: &Client<'_>) {
    let rule = LinuxSyscall {
        Names: strings(&["mkdir", "mkdirat", "not_a_call"]),
        Action: "SCMP_ACT_ERRNO".into(),
        ErrnoRet: Some(
            guest_protocol::protocols::oci::linux_syscall::ErrnoRet::Errnoret(
                libc::ENOTTY.cast_unsigned(),
            ),
        ),
        ..Default::default()
    };
    let profile = LinuxSeccomp {
        DefaultAction: "SCMP_ACT_ALLOW".into(),
        Architectures: strings(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]),
        Syscalls: vec![rule],
        ..Default::default()
    };
    for no_new_privileges in [false, true] {
        let output = client
            .script(
                "seccomp",
                "mkdir /run/x 2>&1; cat /proc/self/status",
                |spec| {
                    process(spec).NoNewPrivileges = no_new_privileges;
                    process(spec).User = Some(User {
                        UID: 33,
                        GID: 33,
                        ..Default::default()
                    })
                    .into();
                    linux(spec).Seccomp = Some(profile.clone()).into();
                },
            )
            .await;
        let wanted = if no_new_privileges { "1" } else { "0" };
        assert_eq!(
            status_fields(&output.stdout, &["NoNewPrivs:", "Seccomp:"]),
            [wanted, "2"],
            "{output:?}"
        );
        assert!(
            output
                .stdout
                .contains("can't create directory '/run/x': Inappropriate ioctl for device"),
            "{output:?}"
        );
    }
}

pub async fn limits_and_oom_score_are_set(client: &Client<'_>) {
    let output = client
        .script(
            "rlimits",
            "ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj",
            |spec| {
                let process = process(spec);
                process.OOMScoreAdj = 321;
                process.Rlimits = vec![
                    POSIXRlimit {
                        Type: "RLIMIT_NOFILE".into(),
                        Soft: 100,
                        Hard: 200,
                        ..Default::default()
                    },
                    POSIXRlimit {
                        Type: "RLIMIT_WISHES".into(),
                        Soft: 1,
                        Hard: 1,
                        ..Default::default()
                    },
                ];
            },
        )
        .await;
    assert_eq!(output.stdout, "100\n200\n321\n", "{output:?}");
}

pub async fn mask_scheduling_and_personality_are_as_told(client: &Client<'_>) {
    // Of stat, 19 is nice and 41 the policy, SCHED_BATCH.
    let script = "umask; cut -d ' ' -f 19,41 /proc/self/stat; cat /proc/self/personality";
    let told = |spec: &mut Spec| {
        let own = process(spec).Own.mut_or_insert_default();
        own.umask = Some(0o027);
        own.scheduler = Some(Scheduler {
            policy: "SCHED_BATCH".into(),
            nice: 4,
            ..Default::default()
        })
        .into();
        own.io_priority = Some(IOPriority {
            class: "IOPRIO_CLASS_IDLE".into(),
            ..Default::default()
        })
        .into();
        linux(spec).Own.mut_or_insert_default().personality = "LINUX32".into();
    };
    let wanted = "0027\n4 3\n00000008\n";
    let output = client.script("scheduled", script, told).await;
    assert_eq!(output.stdout, wanted, "{output:?}");
    let mut spec = client.spec(&["sleep", "1000"]);
    told(&mut spec);
    client.create("scheduled-exec", spec).await.unwrap();
    client.start("scheduled-exec").await.unwrap();
    let output = client.exec_script("scheduled-exec", "e1", script).await;
    assert_eq!(output.stdout, wanted, "an exec takes them over");
    client.remove("scheduled-exec").await.unwrap();
    let mut spec = client.spec(&["true"]);
    process(&mut spec).Own.mut_or_insert_default().umask = Some(0o1000);
    let (_, text) = refusal(client.create("masked", spec).await);
    assert_eq!(text, "umask 0o1000 is more than 0777");
}

pub async fn home_comes_from_passwd(client: &Client<'_>) {
    let home = async |id: &str, uid: u32| {
        let change = |spec: &mut _| process(spec).User.mut_or_insert_default().UID = uid;
        client.script(id, "echo $HOME", change).await.stdout
    };
    assert_eq!(home("home-web", 33).await, "/home/web\n");
    assert_eq!(home("home-root", 0).await, "/root\n");
    assert_eq!(home("home-none", 4711).await, "/\n");
}

pub async fn nothing_of_the_agent_leaks_into_a_process(client: &Client<'_>) {
    // 3 is the listing's own descriptor of the directory.
    let script = "ls /proc/self/fd; grep -Eo 'Sig(Blk|Ign):|.{7}$' /proc/self/status | grep -A1 Sig | grep -v ^--; cat /proc/self/environ | tr '\\0' '\\n' | sort";
    let wanted = "0\n1\n2\n3\nSigBlk:\n0000000\nSigIgn:\n0000000\nHOME=/root\nPATH=/usr/bin:/bin\n";
    let clean = |text: &str| -> String {
        text.lines()
            .filter(|line| {
                !["PWD=", "SHLVL=", "OLDPWD="]
                    .iter()
                    .any(|own| line.starts_with(own))
            })
            .map(|line| format!("{line}\n"))
            .collect()
    };
    assert_eq!(
        clean(&client.script("leaks", script, |_| {}).await.stdout),
        wanted
    );
    client.sleeper("leaks-exec").await;
    assert_eq!(
        clean(&client.exec_script("leaks-exec", "e1", script).await.stdout),
        wanted
    );
    client.remove("leaks-exec").await.unwrap();
}

pub async fn an_exec_joins_the_container(client: &Client<'_>) {
    client.sleeper("joined").await;
    let script = "cat /proc/1/comm; grep ^0: /proc/self/cgroup; ls -d /bin; echo err >&2; [ $$ != 1 ]; exit 9";
    let output = client.exec_script("joined", "e1", script).await;
    assert_eq!((output.status, output.stderr.as_str()), (9, "err\n"));
    assert_eq!(output.stdout, "sleep\n0::/\n/bin\n");
    // Capabilities that the exec does not name are the container's.
    let mut process = client.process(&["grep", "CapEff", "/proc/self/status"]);
    let own = client
        .exec_script("joined", "e2", "grep CapEff /proc/self/status")
        .await;
    process.Capabilities = None.into();
    let streams = client.streams("joined", "e3").await;
    client.exec("joined", "e3", process).await.unwrap();
    assert_eq!(streams.finish(b"").await.stdout, own.stdout);
    client.remove("joined").await.unwrap();
}

pub async fn of_two_execs_with_one_id_one_runs(client: &Client<'_>) {
    client.sleeper("twice").await;
    let exec = || client.exec("twice", "e1", client.process(&["sleep", "1000"]));
    let (first, second) = tokio::join!(exec(), exec());
    let (_, text) = refusal(match (first, second) {
        (Ok(()), refused) | (refused, Ok(())) => refused,
        (first, second) => panic!("{first:?} {second:?}"),
    });
    assert_eq!(text, "exec e1 exists already in container twice");
    client.kill("twice", "e1", libc::SIGKILL).await.unwrap();
    assert_eq!(client.wait("twice", "e1").await.unwrap(), 137);
    client.remove("twice").await.unwrap();
}

pub async fn an_exec_that_cannot_run_fails_at_once(client: &Client<'_>) {
    client.sleeper("fails").await;
    for (command, words) in [
        (
            "levitate",
            "exec: \"levitate\": executable file not found in $PATH",
        ),
        (
            "/bin/levitate",
            "exec: \"/bin/levitate\": stat /bin/levitate: no such file or directory",
        ),
        ("/bin/orphan", "exec /bin/orphan: no such file or directory"),
    ] {
        let (_, text) = refusal(client.exec("fails", "e1", client.process(&[command])).await);
        assert_eq!(text, words);
    }
    let mut process = client.process(&["true"]);
    process.Cwd = "/no/such/place".into();
    let (_, text) = refusal(client.exec("fails", "e1", process).await);
    assert_eq!(
        text,
        "chdir to working directory /no/such/place: no such file or directory"
    );
    // The id is free after each.
    assert_eq!(client.exec_script("fails", "e1", "exit 5").await.status, 5);
    client.kill("fails", "", libc::SIGKILL).await.unwrap();
    client.wait("fails", "").await.unwrap();
    let (_, text) = refusal(client.exec("fails", "e2", client.process(&["true"])).await);
    assert_eq!(text, "container fails is not running");
    client.remove("fails").await.unwrap();
}

pub async fn an_execs_exit_is_reported_to_those_who_wait_and_not_later(client: &Client<'_>) {
    client.sleeper("once").await;
    client
        .exec("once", "e1", client.process(&["sleep", "1000"]))
        .await
        .unwrap();
    let killed = async {
        // The agent has the calls that wait by the time that another process has come and gone.
        client.exec_script("once", "e2", "true").await;
        client.kill("once", "e1", libc::SIGKILL).await.unwrap();
    };
    let (first, second, ()) =
        tokio::join!(client.wait("once", "e1"), client.wait("once", "e1"), killed);
    assert_eq!((first.unwrap(), second.unwrap()), (137, 137));
    let (code, _) = refusal(client.wait("once", "e1").await);
    assert_eq!(code, Code::NOT_FOUND);
    let (code, _) = refusal(client.wait("nobody", "e1").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    client.remove("once").await.unwrap();
}

pub async fn a_term_without_a_handler_is_none_to_a_first_process(client: &Client<'_>) {
    client.sleeper("term").await;
    client.kill("term", "", libc::SIGTERM).await.unwrap();
    let exec = client.exec("term", "e1", client.process(&["sleep", "1000"]));
    exec.await.unwrap();
    client.kill("term", "e1", libc::SIGTERM).await.unwrap();
    assert_eq!(client.wait("term", "e1").await.unwrap(), 143, "of an exec");
    client.kill("term", "", libc::SIGKILL).await.unwrap();
    assert_eq!(client.wait("term", "").await.unwrap(), 137);
    client.remove("term").await.unwrap();
}

pub async fn a_term_with_a_handler_is_the_programs_business(client: &Client<'_>) {
    let script = "trap 'echo bye; exit 42' TERM; echo ready; while :; do sleep 0.05; done";
    let mut stdout = client.stream(Channel::Stdout, "handler", "").await;
    client
        .create("handler", client.spec(&["sh", "-c", script]))
        .await
        .unwrap();
    client.start("handler").await.unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).await.unwrap();
    client
        .kill("handler", "handler", libc::SIGTERM)
        .await
        .unwrap();
    assert_eq!(client.wait("handler", "").await.unwrap(), 42);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "bye\n");
    client.remove("handler").await.unwrap();
}

pub async fn a_kill_ends_everything_in_the_container(client: &Client<'_>) {
    client.sleeper("killed").await;
    client
        .exec("killed", "e1", client.process(&["sleep", "1002"]))
        .await
        .unwrap();
    let waits =
        async { tokio::join!(client.wait("killed", "e1"), client.wait("killed", "killed")) };
    let kill = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        client.kill("killed", "", libc::SIGKILL).await.unwrap();
    };
    let ((exec, init), ()) = tokio::time::timeout(DEADLINE, async { tokio::join!(waits, kill) })
        .await
        .unwrap();
    assert_eq!((exec.unwrap(), init.unwrap()), (137, 137));
    client.remove("killed").await.unwrap();
}

pub async fn a_process_that_is_gone_cannot_be_signalled(client: &Client<'_>) {
    client.create("gone", client.spec(&["true"])).await.unwrap();
    client.start("gone").await.unwrap();
    assert_eq!(client.wait("gone", "").await.unwrap(), 0);
    // A second wait is answered too: only execs are forgotten.
    assert_eq!(client.wait("gone", "").await.unwrap(), 0);
    let (code, _) = refusal(client.kill("gone", "", libc::SIGKILL).await);
    assert_eq!(code, Code::NOT_FOUND);
    let (code, _) = refusal(client.kill("gone", "e1", libc::SIGTERM).await);
    assert_eq!(code, Code::NOT_FOUND);
    client.remove("gone").await.unwrap();
    let (code, _) = refusal(client.kill("gone", "", libc::SIGTERM).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
}

pub async fn background_processes_die_with_the_first(client: &Client<'_>) {
    let output = client
        .script("background", "sleep 1003 & exit 6", |_| {})
        .await;
    // The output ended, so nobody holds its pipe any more.
    assert_eq!((output.status, output.stdout.as_str()), (6, ""));
}
