//! The Sandbox API: containerd's calls for a pod's sandbox that has no task. The sandbox is kept as
//! the same task that stands in for a pause container otherwise, so that all rules for it are the
//! same; only its events are not published.
//!
//! In this mode nobody makes the pod's files (/etc/hosts, /etc/hostname, /etc/resolv.conf) on the
//! host but the shim.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use futures::future::join_all;
use oci_spec::runtime::{Mount, MountBuilder, Spec};
use protobuf::{Enum, EnumOrUnknown, Message};

use crate::config::{Config, HostNetwork};
use crate::container::role;
use crate::error::{Error, IoContext, Result};
use crate::from_guest::Stats;
use crate::guest::calls::GuestCalls;
use crate::guest::machine_size::ResourceLimits;
use crate::host::dir::Dir;
use crate::host::mounts;
use crate::model::{ProcessId, Stdio};
use crate::protos::cri::{
    DNSConfig, LinuxContainerResources, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use crate::sandbox::owner::SandboxOwner;
use crate::sandbox::pod::{Pod, SandboxSpec, Shm};
use crate::sandbox::request::{Outcome, Reply, SandboxStatus};
use crate::sandbox::state::TaskKind;

/// As containerd's CRI makes it for a pod.
const SHM_BYTES: u64 = 64 << 20;

/// The type of the options that carry a pod's configuration.
const POD_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// Files of a pod, and where its containers have them.
const FILES: [(&str, &str); 3] = [
    ("hosts", "/etc/hosts"),
    ("hostname", "/etc/hostname"),
    ("resolv.conf", "/etc/resolv.conf"),
];

impl SandboxOwner {
    /// `CreateSandbox`: boots the virtual machine.
    pub(super) fn create_sandbox(
        &mut self,
        request: &CreateSandboxRequest,
        config: Result<Config>,
        reply: Reply<()>,
    ) {
        let sandbox = request.sandbox_id.clone();
        let launching = config.and_then(|config| {
            let asked = pod_config(request)?;
            let config = config.annotated(&asked.annotations)?;
            refuse_host_namespaces(&asked, config.host_network)?;
            self.state
                .create(&sandbox, &request.bundle_path, Stdio::default())?;
            let launching = self.plan(request, &asked).and_then(|(pod, sandbox_spec)| {
                self.pod = pod;
                self.guest_for(config, sandbox_spec)
            });
            launching.inspect_err(|_| self.create_failed(&sandbox))
        });
        match launching {
            Ok(launching) => self.begin(async move {
                let result = launching.await;
                Outcome::SandboxCreated {
                    sandbox,
                    result,
                    reply,
                }
            }),
            Err(error) => reply.refuse(error),
        }
    }

    pub(super) fn sandbox_created(
        &mut self,
        sandbox: &str,
        result: Result<Arc<dyn GuestCalls>>,
    ) -> Result<()> {
        let guest = result.and_then(|guest| {
            if !guest.features().pod {
                return Err(Error::unimplemented(
                    "the Sandbox API needs Cofferdam's own guest agent",
                ));
            }
            Ok(guest)
        });
        match guest {
            Ok(guest) => {
                self.state
                    .created(sandbox, guest.pid(), TaskKind::PodSandbox);
                Ok(())
            }
            Err(error) => {
                self.create_failed(sandbox);
                Err(error)
            }
        }
    }

    /// What a pod's configuration asks for, with the pod's files made.
    fn plan(
        &self,
        request: &CreateSandboxRequest,
        config: &PodSandboxConfig,
    ) -> Result<(Pod, SandboxSpec)> {
        let linux = config.linux.get_or_default();
        let dir = mounts::make_small(&Dir::open(&self.state_dir())?, "pod")?;
        make_files(&dir, config)?;
        let pod = Pod {
            sysctls: linux.sysctls.clone(),
            // In this mode containerd leaves the default mount on /dev/shm in place.
            shm: Some(Shm {
                source: "shm".into(),
                bytes: SHM_BYTES,
            }),
            need: need(linux.resources.get_or_default()),
            files: Some(dir.path()),
            hidden_from_containerd: true,
            pinned: Vec::new(),
        };
        let netns =
            Some(PathBuf::from(&request.netns_path)).filter(|path| !path.as_os_str().is_empty());
        let hostname = Some(config.hostname.clone()).filter(|name| !name.is_empty());
        let cgroups_path = cgroups_path(&linux.cgroup_parent, &request.sandbox_id);
        Ok((
            pod,
            SandboxSpec {
                hostname,
                cgroups_path,
                host_network: is_node(namespace_options(config).network),
                netns,
            },
        ))
    }

    /// `SandboxStatus`.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub(super) fn sandbox_status(&self, id: &str) -> Result<SandboxStatus> {
        let status = self.state.status(&ProcessId::init(id))?;
        let alive = self.state.alive();
        Ok(SandboxStatus {
            pid: self.state.task(id)?.init.pid,
            status,
            created_at: self.created_at,
            machine: alive.map_or_else(|refusal| refusal.to_string(), |()| "runs".to_owned()),
        })
    }

    /// `PingSandbox`: whether the guest answers. All failures are `UNAVAILABLE`.
    pub(super) fn ping_sandbox(&mut self, id: &str, reply: Reply<()>) {
        let guest = self.state.task(id).and_then(|_| self.living_guest());
        let guest = match guest {
            Ok(guest) => guest,
            Err(refusal) => return reply.refuse(Error::unavailable(refusal.to_string())),
        };
        self.begin(async move {
            let answer = guest.ping().await;
            reply.send(answer.map_err(|error| Error::unavailable(error.to_string())));
            Outcome::Done
        });
    }

    /// `SandboxMetrics`: what all containers together use.
    pub(super) fn sandbox_stats(&mut self, reply: Reply<Stats>) {
        let ids: Vec<String> = self.runtimes.in_guest().cloned().collect();
        self.forward_to_guest(reply, |guest| async move {
            let stats = join_all(ids.iter().map(|id| guest.stats(id))).await;
            // One that ends meanwhile has nothing to add.
            let mut sum = Stats::default();
            stats.into_iter().flatten().for_each(|one| sum.add(&one));
            Ok(sum)
        });
    }
}

fn pod_config(request: &CreateSandboxRequest) -> Result<PodSandboxConfig> {
    let Some(options) = request.options.as_ref() else {
        return Ok(PodSandboxConfig::default());
    };
    match options.type_url.rsplit('/').next() {
        None | Some("") => Ok(PodSandboxConfig::default()),
        Some(POD_CONFIG) => PodSandboxConfig::parse_from_bytes(&options.value).map_err(|error| {
            Error::invalid(format!("the pod's configuration does not parse: {error}"))
        }),
        Some(other) => Err(Error::invalid(format!(
            "sandbox options of type {other:?} are not known: use {POD_CONFIG}"
        ))),
    }
}

/// As containerd's CRI does it: systemd's form below a slice, else a path.
fn cgroups_path(parent: &str, id: &str) -> String {
    match parent.rsplit('/').next() {
        Some("") | None => String::new(),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        Some(_) => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

fn need(resources: &LinuxContainerResources) -> ResourceLimits {
    let number = |value: i64| u64::try_from(value).unwrap_or_default();
    ResourceLimits {
        memory: number(resources.memory_limit_in_bytes),
        quota: number(resources.cpu_quota),
        period: number(resources.cpu_period),
        cpus: 0,
        oom_score_adj: 0,
    }
}

fn namespace_options(config: &PodSandboxConfig) -> &NamespaceOption {
    let security = &config.linux.get_or_default().security_context;
    security.get_or_default().namespace_options.get_or_default()
}

fn is_node(mode: EnumOrUnknown<NamespaceMode>) -> bool {
    mode.value() == NamespaceMode::NODE.value()
}

fn refuse_host_namespaces(config: &PodSandboxConfig, network: HostNetwork) -> Result<()> {
    let options = namespace_options(config);
    let refused = [
        (
            is_node(options.network) && network == HostNetwork::Refuse,
            "network",
            "hostNetwork",
        ),
        (is_node(options.pid), "process ids", "hostPID"),
        (is_node(options.ipc), "IPC", "hostIPC"),
    ];
    match refused.into_iter().find(|(is_refused, ..)| *is_refused) {
        None => Ok(()),
        Some((_, what, setting)) => Err(role::host_namespace(what, setting)),
    }
}

fn make_files(dir: &Dir, config: &PodSandboxConfig) -> Result<()> {
    let write = |name: &str, text: String| {
        let written = dir.make_file(name)?.write_all(text.as_bytes());
        written.doing(|| format!("write {}", dir.path().join(name).display()))
    };
    // What the host has, as containerd does it: the kubelet mounts its own over it.
    write(
        "hosts",
        fs::read_to_string("/etc/hosts").unwrap_or_default(),
    )?;
    write("hostname", format!("{}\n", config.hostname))?;
    let resolv = match config.dns_config.as_ref() {
        Some(dns) => resolv_conf(dns),
        None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    write("resolv.conf", resolv)
}

fn resolv_conf(dns: &DNSConfig) -> String {
    let mut lines = Vec::new();
    if !dns.searches.is_empty() {
        lines.push(format!("search {}\n", dns.searches.join(" ")));
    }
    lines.extend(
        dns.servers
            .iter()
            .map(|server| format!("nameserver {server}\n")),
    );
    if !dns.options.is_empty() {
        lines.push(format!("options {}\n", dns.options.join(" ")));
    }
    lines.concat()
}

/// Gives a container the pod's files, where its spec has no others at their places.
///
/// # Errors
/// None in practice; the builder's own.
pub fn add_files(spec: &mut Spec, dir: &Path) -> Result<()> {
    let mut mounts: Vec<Mount> = spec.mounts().clone().unwrap_or_default();
    for (name, destination) in FILES {
        if mounts
            .iter()
            .any(|mount| mount.destination() == Path::new(destination))
        {
            continue;
        }
        let options = ["rbind", "rprivate", "rw"].map(str::to_owned).to_vec();
        let mount = MountBuilder::default()
            .destination(destination)
            .source(dir.join(name))
            .typ("bind")
            .options(options);
        mounts.push(
            mount
                .build()
                .map_err(|error| Error::internal(error.to_string()))?,
        );
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_files_are_what_kubernetes_asks_for() {
        let dir = tempfile::tempdir().unwrap();
        let dns = DNSConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        let config = PodSandboxConfig {
            hostname: "web-0".into(),
            dns_config: Some(dns).into(),
            ..Default::default()
        };
        make_files(&Dir::open(dir.path()).unwrap(), &config).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("hostname"), "web-0\n");
        assert_eq!(
            read("resolv.conf"),
            "search default.svc svc\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.1.0", "root": {"path": "r"},
            "mounts": [{"destination": "/etc/hosts", "type": "bind", "source": "/mine",
                "options": ["rbind"]}]
        }))
        .unwrap();
        add_files(&mut spec, dir.path()).unwrap();
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("/mine")));
        assert_eq!(
            mounts[2].source().as_deref(),
            Some(dir.path().join("resolv.conf").as_path())
        );
    }

    #[test]
    fn cgroup_parents_of_both_drivers_are_understood() {
        assert_eq!(cgroups_path("/kubepods/pod1", "x"), "/kubepods/pod1/x");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod1.slice", "x"),
            "kubepods-pod1.slice:cri-containerd:x"
        );
        assert_eq!(cgroups_path("", "x"), "");
    }

    #[test]
    fn host_namespaces_are_refused_by_the_name_that_users_know() {
        let mut config = PodSandboxConfig::default();
        refuse_host_namespaces(&config, HostNetwork::Refuse).unwrap();
        assert!(
            !is_node(namespace_options(&config).network),
            "nobody has asked for it"
        );
        let linux = config.linux.mut_or_insert_default();
        linux
            .security_context
            .mut_or_insert_default()
            .namespace_options
            .mut_or_insert_default()
            .ipc = NamespaceMode::NODE.into();
        assert!(
            refuse_host_namespaces(&config, HostNetwork::Passt)
                .unwrap_err()
                .to_string()
                .contains("hostIPC")
        );
    }
}
