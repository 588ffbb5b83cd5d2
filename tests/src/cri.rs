//! A private containerd's CRI plug-in: its configuration of each release, its network of pods, and
//! `crictl` for it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::{Value, json};

use crate::assets;
use crate::command::run;
use crate::procs::{MARK, mark};
use crate::suite::Release;
use crate::{PATIENCE, eventually};

/// The image that a pod's containers have: busybox, and `talk` of tests/images.
pub const TALK: &str = "docker.io/cofferdam/talk:local";

/// The handler whose sandboxes have no task; containerd 2.1 only.
pub const SANDBOX_API: &str = "cofferdam-sandbox";

/// Handler of pods whose root file systems are layers in files; only containerd 2.4 has the
/// snapshotter.
pub const LAYERS: &str = "cofferdam-layers";

const PAUSE: &str = "docker.io/cofferdam/pause:local";

/// MTU of the pods' network, other than a link's by default.
pub const MTU: u32 = 1400;

/// What one daemon's CRI needs.
pub struct Cri {
    dir: PathBuf,
    number: u8,
}

impl Cri {
    /// Of the daemon at `socket`; its files are in `dir`.
    pub fn new(release: Release, socket: &Path, dir: &Path) -> Cri {
        static NUMBER: AtomicU8 = AtomicU8::new(1);
        assert!(
            Path::new("/usr/lib/cni/bridge").exists(),
            "no CNI plug-ins for {release:?}: run `scripts/setup test`"
        );
        let cri = Cri {
            dir: dir.to_owned(),
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
        };
        let endpoint = format!("unix://{}", socket.display());
        let crictl =
            json!({"runtime-endpoint": endpoint, "image-endpoint": endpoint, "timeout": 60});
        std::fs::write(dir.join("crictl.yaml"), crictl.to_string()).unwrap();
        std::fs::create_dir(dir.join("net.d")).unwrap();
        cri.set_network(&[
            json!({
                "type": "bridge", "bridge": cri.bridge(), "isGateway": true, "mtu": MTU,
                "ipam": cri.ipam(json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}])),
            }),
            json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        ]);
        cri
    }

    /// Writes the plug-ins of the pods' network; a daemon reads them when it starts.
    pub fn set_network(&self, plugins: &[Value]) {
        let list = json!({"cniVersion": "0.4.0", "name": "pods", "plugins": plugins});
        std::fs::write(self.dir.join("net.d/pods.conflist"), list.to_string()).unwrap();
    }

    /// Addresses of both families, with these routes.
    pub fn ipam(&self, routes: Value) -> Value {
        let number = self.number;
        json!({
            "type": "host-local", "dataDir": self.dir.join("ipam"), "routes": routes,
            "ranges": [[{"subnet": format!("10.88.{number}.0/24")}],
                [{"subnet": format!("fd88:{number:x}::/64")}]],
        })
    }

    /// The bridge that the pods are at.
    pub fn bridge(&self) -> String {
        format!("pods{}", self.number)
    }

    /// The host's own addresses at the bridge.
    pub fn gateways(&self) -> [String; 2] {
        [
            format!("10.88.{}.1", self.number),
            format!("fd88:{:x}::1", self.number),
        ]
    }

    /// CNI keeps a bridge that has no port left.
    pub(crate) fn remove_bridge(&self) {
        if let Ok(true) =
            std::fs::read_to_string("/proc/net/dev").map(|links| links.contains(&self.bridge()))
        {
            crate::network::ip(&["link", "delete", &self.bridge()]);
        }
    }

    /// The version line of a configuration file, and the tables for CRI. Lowering an oom_score_adj
    /// needs a capability that a container or a CI machine may not have. The snippet that users are
    /// given comes last.
    pub(crate) fn config(&self, release: Release, snapshotter: &str) -> (&'static str, String) {
        let nets = self.dir.join("net.d");
        let (version, snippet, own) = match release {
            Release::V2_1 | Release::V2_2 | Release::V2_3 | Release::V2_4 => (
                "version = 3",
                "containerd-2.toml".to_owned(),
                format!(
                    "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = {snapshotter:?}\n\
                     [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = {PAUSE:?}\n\
                     [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
                     [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = \
                     ['/usr/lib/cni']\nconf_dir = {nets:?}\n\
                     [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n\
                     runtime_type = 'io.containerd.runc.v2'\n\
                     [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{SANDBOX_API}]\n\
                     runtime_type = 'io.containerd.cofferdam.v2'\nsandboxer = 'shim'\n\
                     [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{LAYERS}]\n\
                     runtime_type = 'io.containerd.cofferdam.v2'\nsnapshotter = 'erofs'\n"
                ),
            ),
            Release::V1_6 | Release::V1_7 => (
                "version = 2",
                format!("containerd-{}.toml", release.name()),
                format!(
                    "[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = \
                     {PAUSE:?}\nrestrict_oom_score_adj = true\n\
                     [plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = \
                     {snapshotter:?}\n\
                     [plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = \
                     '/usr/lib/cni'\nconf_dir = {nets:?}\n\
                     [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n\
                     runtime_type = 'io.containerd.runc.v2'\n"
                ),
            ),
        };
        let snippet =
            std::fs::read_to_string(assets::root().join("configs/containerd").join(snippet))
                .unwrap();
        let snippet: Vec<&str> = snippet
            .lines()
            .filter(|line| !line.starts_with("version"))
            .collect();
        (version, own + &snippet.join("\n") + "\n")
    }

    /// CRI notices an imported image by its event.
    pub(crate) fn wait_for_images(&self) {
        for image in [PAUSE, TALK] {
            eventually(&format!("CRI knows {image}"), PATIENCE, || {
                (run(self.command(["inspecti", image]), PATIENCE).status == 0).then_some(())
            });
        }
    }

    /// A `crictl` command for this daemon; no crictl.yaml of the host's has a say.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(assets::crictl());
        command
            .arg("--config")
            .arg(self.dir.join("crictl.yaml"))
            .args(args)
            .env(MARK, mark());
        command
    }
}
