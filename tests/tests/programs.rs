//! Programs that people put into containers, from Debian's packages: an init system, databases,
//! servers, a compiler, docker. The image is scripts/programs'. `make test` runs the quick ones,
//! `make test-programs` all of them, under runc too.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cofferdam_tests::command::{Output, Running, run};
use cofferdam_tests::{Container, Env, PATIENCE, Release, Suite, assets, cases, eventually};

fn main() -> ExitCode {
    Suite::new().run_on(
        &[Release::V1_7],
        cases![
            Once: sqlite_survives_kill, redis_keeps_its_data, nginx_serves, gcc_builds_and_runs;
            Heavy: systemd_boots_as_pid_1_and_stops, postgres_with_pgbench, git_clone_gc_fsck,
                packages_are_installed_and_removed, fio_verifies, docker_in_a_container,
                docker_publishes_a_port;
        ],
    )
}

/// What a script of real programs may take, on a slow machine in emulation.
const LONG: Duration = Duration::from_secs(300);

/// Reaps what daemons leave.
const IDLE: [&str; 4] = ["tini", "--", "sleep", "infinity"];

/// A machine of the image's, with a directory of the host's at `/v`.
struct Machine<'e> {
    env: &'e Env,
    container: Container<'e>,
    volume: PathBuf,
}

impl<'e> Machine<'e> {
    /// One that waits for execs.
    fn idle(env: &'e Env) -> Machine<'e> {
        Machine::new(env, &env.dir.join("volume"), &[], &IDLE)
    }

    fn new(env: &'e Env, volume: &Path, flags: &[&str], command: &[&str]) -> Machine<'e> {
        import(env);
        fs::create_dir_all(volume).unwrap();
        let id = env.id();
        let bind = format!(
            "--mount=type=bind,src={},dst=/v,options=rbind:rw",
            volume.display()
        );
        let memory = (1_u64 << 30).to_string();
        let base = [
            "run",
            "-d",
            "--null-io",
            "--snapshotter",
            env.daemon.snapshotter,
            "--runtime",
            env.runtime.name(),
            "--memory-limit",
            &memory,
            "--env=LANG=C.UTF-8",
            &bind,
        ];
        let command = [&base[..], flags, &[assets::PROGRAMS, &id], command].concat();
        run(env.daemon.ctr_command(command), PATIENCE).ok();
        Machine {
            env,
            container: Container::adopt(env, &id),
            volume: volume.to_owned(),
        }
    }

    /// Runs a script; gives what it said, and fails with what it complained about.
    #[track_caller]
    fn sh(&self, script: &str) -> String {
        self.try_sh(script).ok().text()
    }

    #[track_caller]
    fn try_sh(&self, script: &str) -> Output {
        self.start(script).wait(LONG)
    }

    /// A script that goes on by itself.
    fn start(&self, script: &str) -> Running {
        let exec_id = self.env.id();
        let command = ["bash", "-euc", script];
        Running::start(self.container.exec_command(&exec_id, &[], &command), None)
    }

    /// Waits for a command inside that succeeds.
    #[track_caller]
    fn until(&self, command: &str) {
        eventually(command, LONG, || {
            let output = self.try_sh(command);
            let errors = output.errors();
            assert!(!errors.contains("stopped state"), "{command}: {errors}");
            (output.status == 0).then_some(())
        });
    }

    /// Kills it, as a whole.
    #[track_caller]
    fn kill(self) {
        self.container.kill("SIGKILL", &[]).ok();
        assert_eq!(self.container.finish(), 137);
    }
}

/// Brings the image to the test's containerd, once.
fn import(env: &Env) {
    static THERE: Mutex<Option<HashSet<Release>>> = Mutex::new(None);
    let mut there = THERE.lock().unwrap_or_else(PoisonError::into_inner);
    if there.get_or_insert_default().insert(env.daemon.release) {
        env.import(&assets::programs());
    }
}

/// As podman runs it: not privileged, with a cgroup namespace, and its cgroup to write to.
fn systemd_boots_as_pid_1_and_stops(env: &Env) {
    let flags = [
        "--env=container=oci",
        "--with-ns=cgroup:",
        "--mount=type=tmpfs,src=tmpfs,dst=/tmp,options=mode=1777",
        "--mount=type=tmpfs,src=tmpfs,dst=/run/lock,options=mode=1777",
        "--mount=type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw",
    ];
    let machine = Machine::new(env, &env.dir.join("volume"), &flags, &["/sbin/init"]);
    machine.until("systemctl is-system-running --wait | grep -E 'running|degraded'");
    let failed = machine.sh("systemctl --failed --no-legend --plain");
    assert_eq!(failed, "", "failed units");
    assert_eq!(
        machine.sh("cat /proc/1/comm; systemctl is-active systemd-journald"),
        "systemd\nactive"
    );
    machine.sh("systemctl start redis-server nginx");
    let answers = machine.sh("redis-cli ping; systemctl is-active redis-server nginx");
    assert_eq!(answers, "PONG\nactive\nactive");
    let said = machine.sh(
        "printf '[Service]\nType=oneshot\nExecStart=echo to the journal\n' \
             >/run/systemd/system/said.service
         systemctl daemon-reload && systemctl start said && journalctl -q --sync
         journalctl -o cat -u said -t echo",
    );
    assert_eq!(said, "to the journal");
    // A service that ends comes back as its unit says, in a cgroup of its own.
    machine.sh("kill -9 $(systemctl show -P MainPID redis-server)");
    machine.until("systemctl show -P NRestarts redis-server | grep -x 1 && redis-cli ping");
    // SIGRTMIN+3: halt, which without CAP_SYS_BOOT is an exit.
    machine.container.kill("37", &[]).ok();
    assert_eq!(machine.container.finish(), 0);
}

fn postgres_with_pgbench(env: &Env) {
    let machine = Machine::idle(env);
    machine.sh("pg_ctlcluster 15 main start");
    let postgres = |command: &str| machine.sh(&format!("cd / && su postgres -c \"{command}\""));
    let sums = "select (select sum(abalance) from pgbench_accounts) = s and
        (select sum(bbalance) from pgbench_branches) = s and
        (select sum(tbalance) from pgbench_tellers) = s and n > 0
        from (select sum(delta) as s, count(*) as n from pgbench_history) as h";
    let sums = format!("psql -Atc '{sums}' bench");
    postgres("createdb bench && pgbench -q -i -s 1 bench 2>&1");
    let bench = postgres("pgbench -c 4 -j 2 -t 50 bench 2>&1");
    assert!(bench.contains("actually processed: 200/200"), "{bench}");
    assert_eq!(postgres(&sums), "t");
    // The server's own compiler writes code and runs it.
    let compiled = "explain (analyze) select sum(aid + 1) from pgbench_accounts";
    let compiled = postgres(&format!(
        "psql -Atc 'set jit_above_cost = 0' -c '{compiled}' bench"
    ));
    assert!(compiled.contains("JIT:"), "{compiled}");
    // A crash in the middle of writes: the log brings back what was promised.
    let writes = machine.start("cd / && su postgres -c 'pgbench -n -c 2 -T 250 bench'");
    let count = "psql -Atc 'select count(*) from pgbench_history' bench";
    eventually("pgbench writes", LONG, || {
        (postgres(count).parse::<u32>().unwrap() > 230).then_some(())
    });
    machine.sh("pkill -9 -x postgres; while pgrep -x postgres; do sleep 0.1; done");
    assert_ne!(writes.wait(LONG).status, 0, "its server is dead");
    machine.sh("pg_ctlcluster 15 main start");
    assert_eq!(postgres(&sums), "t");
    postgres("/usr/lib/postgresql/15/bin/pg_amcheck --install-missing --heapallindexed bench");
    machine.sh("pg_ctlcluster 15 main stop");
    machine.kill();
}

/// A writer that says which rows it has been promised.
const SQLITE_WRITER: &str =
    "echo 'pragma synchronous = full; pragma journal_mode = MODE;' >/tmp/sql
    echo 'create table if not exists t (id integer primary key, text);' >>/tmp/sql
    for n in $(seq 2000); do echo 'insert into t (text) values (hex(randomblob(500)));'
        echo 'select max(id) from t;'; done >>/tmp/sql
    stdbuf -oL sqlite3 -bail DIR/db </tmp/sql >DIR/promised";
const SQLITE_CHECK: &str = "sqlite3 DIR/db 'pragma integrity_check; select max(id) from t;'
    tail -n 2 DIR/promised | grep -x '[0-9]*' | tail -n 1";

fn sqlite_survives_kill(env: &Env) {
    let volume = env.dir.join("volume");
    let mut machine = Machine::idle(env);
    machine.sh("mkdir /data");
    let check = |machine: &Machine, dir: &str| {
        let said = machine.sh(&SQLITE_CHECK.replace("DIR", dir));
        let lines: Vec<&str> = said.lines().collect();
        let &[state, rows, promised] = &lines[..] else {
            panic!("{said}");
        };
        assert_eq!(state, "ok");
        let (rows, promised): (u32, u32) = (rows.parse().unwrap(), promised.parse().unwrap());
        assert!(rows >= promised, "{rows} of {promised} promised rows");
        promised
    };
    let write = |machine: &Machine, dir: &str, mode: &str| {
        machine.sh(&format!("rm -f {dir}/promised"));
        let script = SQLITE_WRITER.replace("DIR", dir).replace("MODE", mode);
        let writer = machine.start(&script);
        machine.until(&format!("[ $(wc -l <{dir}/promised) -gt 30 ]"));
        writer
    };
    for mode in ["delete", "wal", "truncate"] {
        for dir in ["/data", "/v"] {
            let writer = write(&machine, dir, mode);
            machine.sh("pkill -9 -x sqlite3");
            writer.wait(LONG).exits(137);
            check(&machine, dir);
        }
    }
    // The whole machine, from outside; the directory of the host stays.
    for mode in ["wal", "delete"] {
        let writer = write(&machine, "/v", mode);
        machine.kill();
        assert_ne!(writer.wait(LONG).status, 0);
        machine = Machine::new(env, &volume, &[], &IDLE);
        check(&machine, "/v");
    }
    machine.kill();
}

const GIT: &str = "cd DIR && git config --global user.name a && git config --global user.email a@b
    git config --global init.defaultBranch main && git config --global advice.detachedHead false
    git init -q one && cd one
    for n in $(seq 40); do mkdir -p dir$((n % 5)) && seq $n 500 >dir$((n % 5))/file$n
        git add . && git commit -q -m \"commit $n\"; [ $((n % 10)) != 0 ] || git tag tag$n; done
    cd .. && git clone -q --no-local one two && cd two && git checkout -q tag20 &&
    git checkout -q -b side && git mv dir1/file1 moved && git commit -qm moved && git rebase -q main
    git gc -q --prune=now --aggressive && git fsck --full --strict && git push -q origin side
    cd ../one && git merge -q side && git repack -qadf && git fsck --full --strict
    git clone -q --bare . ../three && git -C ../three fsck --full && git status --porcelain
    git -C ../three rev-list --count --all && git ls-tree --name-only HEAD moved dir1/file1";

fn git_clone_gc_fsck(env: &Env) {
    let machine = Machine::idle(env);
    machine.sh("mkdir /data");
    for dir in ["/data", "/v"] {
        let said = machine.sh(&GIT.replace("DIR", dir));
        assert_eq!(said, "41\nmoved", "{dir}");
    }
    assert!(machine.volume.join("one/moved").exists());
    machine.kill();
}

/// Two packages, of which one needs the other, and a repository with both.
const MAKE_PACKAGES: &str = "mkdir -p /repo && cd /tmp
    for name in lower upper; do
        mkdir -p $name/DEBIAN $name/usr/bin $name/etc
        printf '#!/bin/sh\\necho this is %s\\n' $name >$name/usr/bin/$name
        chmod 755 $name/usr/bin/$name && echo setting=1 >$name/etc/$name.conf
        printf 'Package: %s\\nVersion: 1.0\\nArchitecture: all\\n' $name >$name/DEBIAN/control
        echo 'Maintainer: a <a@b>' >>$name/DEBIAN/control
        [ $name = lower ] || echo 'Depends: lower (>= 1.0)' >>$name/DEBIAN/control
        echo 'Description: a test' >>$name/DEBIAN/control
        echo /etc/$name.conf >$name/DEBIAN/conffiles
        (cd $name && md5sum usr/bin/$name >DEBIAN/md5sums)
        printf '#!/bin/sh\\ntouch /var/lib/%s.configured\\n' $name >$name/DEBIAN/postinst
        printf '#!/bin/sh\\nrm -f /var/lib/%s.configured\\n' $name >$name/DEBIAN/postrm
        chmod 755 $name/DEBIAN/post*
        dpkg-deb --root-owner-group --build $name /repo >/dev/null
    done
    cd /repo && for deb in *.deb; do
        dpkg-deb -f $deb
        printf 'Filename: ./%s\\nSize: %s\\nSHA256: ' $deb $(stat -c %s $deb)
        sha256sum <$deb | cut -c1-64 && echo
    done >Packages
    echo 'deb [trusted=yes] file:/repo ./' >/etc/apt/sources.list && chmod -R a+rX /repo";

fn packages_are_installed_and_removed(env: &Env) {
    let machine = Machine::idle(env);
    machine.sh(MAKE_PACKAGES);
    let lower = "dpkg -i /repo/lower_1.0_all.deb >/dev/null && dpkg -V lower && lower &&
        ls /var/lib/lower.configured";
    assert_eq!(
        machine.sh(lower),
        "this is lower\n/var/lib/lower.configured"
    );
    machine.sh("echo changed >>/usr/bin/lower");
    let changed = machine.try_sh("dpkg -V lower").text();
    assert!(changed.contains("/usr/bin/lower"), "{changed}");
    machine.sh("dpkg -P lower && ! ls /usr/bin/lower /etc/lower.conf /var/lib/lower.configured");
    let install = "export DEBIAN_FRONTEND=noninteractive
        apt-get -q update >/dev/null && apt-get -q install -y upper >/dev/null &&
        dpkg -V upper lower && upper && lower";
    assert_eq!(machine.sh(install), "this is upper\nthis is lower");
    machine.sh("apt-get -q remove -y lower && ! ls /usr/bin/upper && ls /etc/upper.conf");
    machine.sh("apt-get -q purge -y upper lower && ! ls /etc/upper.conf /etc/lower.conf");
    // Packages of the image's own, with many files, are taken away, and the rest still fits.
    machine.sh("apt-get -q purge -y git >/dev/null && ! ls /usr/bin/git && dpkg --audit");
    assert_eq!(machine.sh("dpkg --audit; apt-get -q check >/dev/null"), "");
    machine.kill();
}

fn redis_keeps_its_data(env: &Env) {
    let machine = Machine::idle(env);
    machine.sh("mkdir /data");
    for dir in ["/data", "/v"] {
        let start = format!(
            "redis-server --daemonize yes --appendonly yes --appendfsync always --dir {dir} \
                 >/dev/null
             until redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.1; done"
        );
        let kill = "pkill -9 -x redis-server; while pgrep -x redis-server; do sleep 0.1; done";
        machine.sh(&start);
        machine.sh("for n in $(seq 1000); do echo \"set key$n $n\"; done | redis-cli >/dev/null");
        machine.sh(kill);
        machine.sh(&start);
        assert_eq!(
            machine.sh("redis-cli dbsize; redis-cli get key777"),
            "1000\n777"
        );
        // Children write the whole state while the server goes on.
        let rewrite =
            "until_says() { until redis-cli info persistence | grep -q $1; do sleep 0.1; done; }
            redis-cli bgrewriteaof >/dev/null; redis-cli set later 1 >/dev/null
            until_says aof_rewrite_in_progress:0; redis-cli bgsave >/dev/null
            until_says rdb_bgsave_in_progress:0
            redis-cli info persistence | grep -E 'last_bg.*status' | tr -d '\\r'";
        assert_eq!(
            machine.sh(rewrite),
            "rdb_last_bgsave_status:ok\naof_last_bgrewrite_status:ok"
        );
        machine.sh(kill);
        machine.sh(&start);
        assert_eq!(
            machine.sh("redis-cli dbsize; redis-cli get later"),
            "1001\n1",
            "{dir}"
        );
        machine.sh("redis-cli shutdown; while pgrep -x redis-server; do sleep 0.1; done");
    }
    machine.kill();
}

const FETCH: &str = "import hashlib, sys, threading, urllib.request
def fetch(path):
    body = urllib.request.urlopen('http://127.0.0.1' + path).read()
    print(hashlib.sha256(body).hexdigest(), flush=True)
threads = [threading.Thread(target=fetch, args=(path,)) for path in sys.argv[1:]]
[thread.start() for thread in threads]
[thread.join() for thread in threads]";

fn nginx_serves(env: &Env) {
    let machine = Machine::idle(env);
    fs::write(machine.volume.join("fetch.py"), FETCH).unwrap();
    machine.sh(
        "head -c 20M /dev/urandom >/v/big && cp /v/big /var/www/html/big && chmod 644 /v/big
        sed -i 's,server_name _;,server_name _; location /v/ { alias /v/; },' \
            /etc/nginx/sites-available/default
        nginx -t -q && nginx && pgrep -x nginx | wc -l",
    );
    let wanted = machine.sh("sha256sum </v/big | cut -c1-64");
    let got = machine.sh("python3 /v/fetch.py /big /v/big /big /v/big");
    assert_eq!(got, [wanted.as_str(); 4].join("\n"));
    machine.sh("grep -c ' 200 ' /var/log/nginx/access.log | grep -x 4");
    // New workers take over, and the old ones end.
    machine.sh(
        "old=$(cat /run/nginx.pid); before=$(pgrep -P $old | head -n 1); nginx -s reload
        while kill -0 $before 2>/dev/null; do sleep 0.1; done; python3 /v/fetch.py /",
    );
    machine.sh("nginx -s quit; while pgrep -x nginx; do sleep 0.1; done");
    machine.kill();
}

const MAIN_C: &str = "#include <math.h>
#include <pthread.h>
#include <stdio.h>
double part(int from);
static void *thread(void *from) { static double sums[4]; long n = (long)from;
    sums[n] = part((int)n); return &sums[n]; }
int main(void) {
    pthread_t threads[4]; double sum = 0;
    for (long n = 0; n < 4; n++) pthread_create(&threads[n], 0, thread, (void *)n);
    for (int n = 0; n < 4; n++) {
        void *one; pthread_join(threads[n], &one); sum += *(double *)one; }
    printf(\"%.4f\\n\", sqrt(6 * sum)); }
";
const PART_C: &str = "double part(int from) { double sum = 0;
    for (int n = 1000000 - from; n > 0; n -= 4) sum += 1.0 / n / n;
    return sum; }
";

fn gcc_builds_and_runs(env: &Env) {
    let machine = Machine::idle(env);
    fs::write(machine.volume.join("main.c"), MAIN_C).unwrap();
    fs::write(machine.volume.join("part.c"), PART_C).unwrap();
    machine.sh("mkdir /data && cp /v/*.c /data");
    for dir in ["/data", "/v"] {
        let script = format!(
            "cd {dir} && gcc -Wall -Werror -O2 -fPIC -shared -o libpart.so part.c &&
             gcc -Wall -Werror -O2 -g -pthread -o shared main.c -L. -lpart -lm \
                 -Wl,-rpath,{dir} && ./shared &&
             gcc -O2 -c main.c part.c && ar rcs libboth.a main.o part.o &&
             gcc -static -pthread -o static libboth.a -lm && ./static"
        );
        assert_eq!(machine.sh(&script), "3.1416\n3.1416", "{dir}");
    }
    machine.kill();
}

fn fio_verifies(env: &Env) {
    let machine = Machine::idle(env);
    machine.sh("mkdir /data");
    for dir in ["/data", "/v"] {
        for way in [
            "--ioengine=psync --rw=randwrite --bs=4k --size=8m --fsync=64",
            "--ioengine=libaio --rw=randrw --bs=4k-64k --size=8m --iodepth=8 --direct=1",
            "--ioengine=mmap --rw=randwrite --bs=4k --size=8m",
            "--ioengine=psync --rw=write --bs=1m --size=32m --numjobs=2 --fallocate=none",
        ] {
            let said = machine.sh(&format!(
                "fio --name=it --directory={dir} {way} --verify=crc32c --verify_fatal=1 \
                 --verify_backlog=128 --group_reporting --output-format=terse && rm {dir}/it*"
            ));
            assert!(!said.contains("verify:"), "{dir}, {way}: {said}");
        }
    }
    machine.kill();
}

/// As the image docker:dind does it: with cgroup v2, only a cgroup without processes can have
/// children with limits.
const DIVIDE: &str = "cd /sys/fs/cgroup; if [ -e cgroup.controllers ]; then
        mkdir init && xargs -rn1 <cgroup.procs >init/cgroup.procs
        until sed 's/ / +/g; s/^/+/' cgroup.controllers >cgroup.subtree_control; do sleep 0.1; done
    fi 2>/dev/null; touch /divided; cd /; exec tini -- sleep infinity";

/// Docker of the image's own, with its directory on the host's, and an image of busybox in it.
fn docker(env: &Env) -> (Machine<'_>, Running) {
    let tree = env.dir.join("tree");
    assets::busybox_tree(&tree);
    let bind = format!(
        "--mount=type=bind,src={},dst=/tree,options=rbind:ro",
        tree.display()
    );
    let flags = [
        "--privileged",
        "--with-ns=cgroup:",
        "--mount=type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw",
        &bind,
    ];
    let volume = env.dir.join("volume");
    let machine = Machine::new(env, &volume, &flags, &["sh", "-c", DIVIDE]);
    machine.until("test -e /divided");
    let mut docker = machine.start("exec dockerd --data-root=/v/docker 2>/v/log >&2");
    eventually("dockerd answers", LONG, || {
        let log = || fs::read_to_string(machine.volume.join("log")).unwrap_or_default();
        assert_eq!(docker.child.try_wait().unwrap(), None, "{}", log());
        (machine.try_sh("docker info").status == 0).then_some(())
    });
    machine.sh("tar -C /tree -cf - . | docker import - busybox:local");
    (machine, docker)
}

/// In order.
fn stop_docker(machine: Machine<'_>, docker: Running) {
    machine.sh("kill $(cat /run/docker.pid); while pgrep dockerd; do sleep 0.1; done");
    docker.wait(LONG).ok();
    machine.kill();
}

fn docker_in_a_container(env: &Env) {
    let (machine, docker) = docker(env);
    assert_eq!(machine.sh("docker info -f '{{.Driver}}'"), "overlay2");
    let run = "docker run --rm --network none busybox:local sh -c";
    let said = machine.sh(&format!(
        "{run} 'echo from inside; id -u; hostname | wc -c'"
    ));
    assert_eq!(said, "from inside\n0\n13");
    machine.try_sh(&format!("{run} 'exit 7'")).exits(7);
    let limits = "cat /sys/fs/cgroup/memory.max 2>/dev/null ||
        cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    let kept = format!(
        "docker run --name kept --network none -d -m 64m --cpus 0.5 busybox:local sh -c \
             'rm /bin/vi; echo x >/file; sleep 1000' >/dev/null
         until docker exec kept cat /file 2>/dev/null; do sleep 0.1; done
         docker exec kept sh -c '{limits}'; docker diff kept | sort
         docker exec kept ls /bin/vi 2>&1 || docker kill kept
         docker commit kept busybox:changed >/dev/null && docker rm kept
         docker run --rm --network none busybox:changed sh -c 'cat /file; ls /bin/vi 2>&1' || true"
    );
    let gone = "ls: /bin/vi: No such file or directory";
    let wanted = format!("x\n67108864\nA /file\nC /bin\nD /bin/vi\n{gone}\nkept\nkept\nx\n{gone}");
    assert_eq!(machine.sh(&kept), wanted);
    stop_docker(machine, docker);
}

/// By docker's bridge, its rules of iptables and its proxy.
fn docker_publishes_a_port(env: &Env) {
    let (machine, docker) = docker(env);
    fs::write(machine.volume.join("fetch.py"), FETCH).unwrap();
    fs::create_dir(machine.volume.join("site")).unwrap();
    fs::write(machine.volume.join("site/page"), "hello\n").unwrap();
    machine.sh(
        "docker network create --subnet 10.9.0.0/24 net && docker run -d --name web --network net \
             -p 80:8080 -v /v/site:/site:ro busybox:local httpd -f -p 8080 -h /site",
    );
    // By its name, which docker's own server knows.
    let fetch = "docker run --rm --network net busybox:local wget -qO- http://web:8080/page";
    machine.until(&format!("{fetch} | grep -x hello"));
    let hello = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
    assert_eq!(machine.sh("python3 /v/fetch.py /page"), hello);
    // Not from another network.
    let address = "{{.NetworkSettings.Networks.net.IPAddress}}";
    machine.sh(&format!(
        "! docker run --rm busybox:local wget -T 2 -qO- \
             http://$(docker inspect -f '{address}' web):8080/page"
    ));
    machine.sh("docker rm -f web && docker network rm net");
    stop_docker(machine, docker);
}
