//! etcd, API server, controller manager, scheduler and cluster DNS: processes in the hub.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::addresses::{Families, Family};
use crate::cgroup::Cgroup;
use crate::command::Run;
use crate::config;
use crate::names::{API_PORT, LabName, WEB_PORT};
use crate::pki::{Pki, Subject};
use crate::process::{Daemon, ProcessId};
use crate::san;
use crate::state::LabPaths;
use crate::tools::{Tools, lab_binary};
use crate::wait::{PermanentError, wait_for};

/// A component of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Component {
    /// etcd.
    Etcd,
    /// kube-apiserver.
    Apiserver,
    /// kube-controller-manager.
    ControllerManager,
    /// kube-scheduler.
    Scheduler,
    /// `CoreDNS`.
    Dns,
    /// The lab's web server.
    Web,
    /// The lab's SAN: in the emulated tier only.
    San,
}

impl Component {
    /// All that every lab has, in the order in which they start.
    pub const ALL: [Self; 6] = [
        Self::Etcd,
        Self::Apiserver,
        Self::ControllerManager,
        Self::Scheduler,
        Self::Dns,
        Self::Web,
    ];

    /// The program's name, which is also its log's and its cgroup's.
    pub fn program(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Apiserver => "kube-apiserver",
            Self::ControllerManager => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
            Self::Dns => "coredns",
            Self::Web => "lab-web",
            Self::San => "lab-san",
        }
    }
}

/// The control plane of one lab.
#[derive(Debug)]
pub struct ControlPlane<'a> {
    /// The lab's name.
    pub name: &'a LabName,
    /// The lab's files.
    pub paths: &'a LabPaths,
    /// Where the logs go.
    pub logs: &'a Path,
    /// Kubernetes.
    pub tools: &'a Tools,
    /// The cluster's address families.
    pub families: Families,
}

impl ControlPlane<'_> {
    /// Issues certificates and starts everything; the API server answers when this returns.
    pub fn start_all(&self, pki: &Pki) -> Result<()> {
        self.prepare(pki)?;
        let etcd = self.start(Component::Etcd)?;
        let apiserver = self.start(Component::Apiserver)?;
        self.wait_ready(&[(Component::Etcd, etcd), (Component::Apiserver, apiserver)])?;
        let others = Component::ALL.iter().skip(2);
        others
            .copied()
            .try_for_each(|component| self.start(component).map(drop))
    }

    /// Starts one component, also after it was killed: its configuration is on disk.
    pub fn start(&self, component: Component) -> Result<ProcessId> {
        let cgroup = self.cgroup_path(component);
        Cgroup::at(&cgroup)?.create()?;
        let program = match component {
            Component::Web | Component::San => lab_binary()?,
            other => self.tools.path(other.program())?,
        };
        let program = program.to_string_lossy().into_owned();
        let argv = std::iter::once(program).chain(self.args(component));
        let log = self.logs.join(format!("{}.log", component.program()));
        Daemon::new(cgroup, &log, argv)
            .in_netns(self.name.hub_netns())
            .start()
    }

    /// Kills one component with everything it started.
    pub fn kill(&self, component: Component) -> Result<()> {
        Cgroup::at(self.cgroup_path(component))?.kill_all()
    }

    /// Freezes or thaws one component.
    pub fn freeze(&self, component: Component, frozen: bool) -> Result<()> {
        Cgroup::at(self.cgroup_path(component))?.freeze(frozen)
    }

    /// Whether one component runs.
    pub fn running(&self, component: Component) -> Result<bool> {
        Ok(!Cgroup::at(self.cgroup_path(component))?
            .processes()?
            .is_empty())
    }

    /// Waits for the API server to say that it is ready.
    pub fn wait_ready(&self, must_live: &[(Component, ProcessId)]) -> Result<()> {
        let kubeconfig = self.paths.pki().join("admin.kubeconfig");
        let kubectl = self.tools.path("kubectl")?;
        wait_for("the API server", API_DEADLINE, || {
            for (component, process) in must_live {
                if !process.alive() {
                    return Err(PermanentError(format!("{} has ended", component.program())).into());
                }
            }
            let answer = Run::in_netns(&self.name.hub_netns(), &kubectl)
                .args(["--request-timeout=5s", "--kubeconfig"])
                .arg(&kubeconfig)
                .args(["get", "--raw", "/readyz"])
                .text()?;
            ensure!(answer.trim() == "ok", "it says {answer}");
            Ok(())
        })
    }

    fn cgroup_path(&self, component: Component) -> String {
        format!("{}/hub/{}", self.name.cgroup(), component.program())
    }

    fn prepare(&self, pki: &Pki) -> Result<()> {
        let server = Subject {
            user: "kube-apiserver",
            names: [
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "localhost",
            ]
            .map(str::to_owned)
            .to_vec(),
            addresses: vec![
                self.families.first().hub(),
                self.families.first().api_service(),
                self.families.first().loopback(),
            ],
            ..Subject::default()
        };
        pki.issue_files("apiserver", &server)?;
        let masters = Some("system:masters");
        let client = Subject {
            user: "kube-apiserver-kubelet",
            group: masters,
            ..Subject::default()
        };
        pki.issue_files("kubelet-client", &client)?;
        // An authority of its own: whoever has a certificate of it may claim to be any user.
        let front_proxy = Pki::create(&pki.dir().join("front-proxy"), self.families.first())?;
        let client = Subject {
            user: FRONT_PROXY,
            ..Subject::default()
        };
        front_proxy.issue_files("client", &client)?;
        pki.kubeconfig_file("admin", "lab-admin", masters)?;
        pki.kubeconfig_file("controller-manager", "system:kube-controller-manager", None)?;
        pki.kubeconfig_file("scheduler", "system:kube-scheduler", None)?;
        // Cluster DNS reads Services and EndpointSlices of every namespace; in a lab it may read all.
        let dns = pki.kubeconfig_file("dns", "lab-dns", masters)?;
        fs::write(
            pki.dir().join("Corefile"),
            config::corefile(self.families.first(), &dns),
        )
        .context("write the Corefile")?;
        Ok(())
    }

    /// The API server's side of aggregated APIs.
    fn front_proxy_args(&self) -> Vec<String> {
        let dir = self.paths.pki().join("front-proxy");
        let file = |flag: &str, name: &str| format!("--{flag}={}", dir.join(name).display());
        vec![
            file("requestheader-client-ca-file", "ca.crt"),
            file("proxy-client-cert-file", "client.crt"),
            file("proxy-client-key-file", "client.key"),
            format!("--requestheader-allowed-names={FRONT_PROXY}"),
            "--requestheader-username-headers=X-Remote-User".into(),
            "--requestheader-uid-headers=X-Remote-Uid".into(),
            "--requestheader-group-headers=X-Remote-Group".into(),
            "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
            // The hub has no kube-proxy: it reaches pods, and no Service.
            "--enable-aggregator-routing=true".into(),
        ]
    }

    fn args(&self, component: Component) -> Vec<String> {
        let pki = self.paths.pki();
        let (first, services) = (self.families.first(), self.families.list(Family::services));
        let file = |flag: &str, name: &str| format!("--{flag}={}", pki.join(name).display());
        match component {
            Component::Etcd => vec![
                format!("--data-dir={}", self.paths.dir().join("etcd").display()),
                "--listen-client-urls=http://127.0.0.1:2379".into(),
                "--advertise-client-urls=http://127.0.0.1:2379".into(),
                "--listen-peer-urls=http://127.0.0.1:2380".into(),
                "--unsafe-no-fsync".into(),
                "--log-level=warn".into(),
            ],
            Component::Apiserver => [
                "--etcd-servers=http://127.0.0.1:2379".into(),
                format!("--advertise-address={}", first.hub()),
                format!("--bind-address={}", first.unspecified()),
                format!("--secure-port={API_PORT}"),
                format!("--service-cluster-ip-range={services}"),
                "--authorization-mode=Node,RBAC".into(),
                "--enable-admission-plugins=NodeRestriction".into(),
                // 300 s by default: scenarios wait for pods to be evicted from lost nodes.
                "--default-not-ready-toleration-seconds=20".into(),
                "--default-unreachable-toleration-seconds=20".into(),
                "--allow-privileged=true".into(),
                // The lab's node names are in no DNS.
                "--kubelet-preferred-address-types=InternalIP".into(),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                file("service-account-key-file", "sa.pub"),
                file("service-account-signing-key-file", "sa.key"),
                file("client-ca-file", "ca.crt"),
                file("tls-cert-file", "apiserver.crt"),
                file("tls-private-key-file", "apiserver.key"),
                file("kubelet-client-certificate", "kubelet-client.crt"),
                file("kubelet-client-key", "kubelet-client.key"),
                file("kubelet-certificate-authority", "ca.crt"),
            ]
            .into_iter()
            .chain(self.front_proxy_args())
            .collect(),
            Component::ControllerManager => vec![
                file("kubeconfig", "controller-manager.kubeconfig"),
                file("root-ca-file", "ca.crt"),
                file("service-account-private-key-file", "sa.key"),
                file("cluster-signing-cert-file", "ca.crt"),
                file("cluster-signing-key-file", "ca.key"),
                format!("--cluster-cidr={}", self.families.list(Family::pods)),
                "--use-service-account-credentials=true".into(),
                "--authentication-skip-lookup=true".into(),
                "--leader-elect=false".into(),
                // Default 40 s. Shorter, because scenarios wait for it; Bascule must not depend on its value.
                "--node-monitor-grace-period=16s".into(),
            ],
            Component::Scheduler => vec![
                file("kubeconfig", "scheduler.kubeconfig"),
                "--authentication-skip-lookup=true".into(),
                "--leader-elect=false".into(),
            ],
            Component::Dns => {
                vec![
                    "-conf".into(),
                    pki.join("Corefile").to_string_lossy().into_owned(),
                ]
            }
            Component::Web => vec![
                "serve".into(),
                format!("--dir={}", self.paths.web().display()),
                format!("--address={}", SocketAddr::new(first.hub(), WEB_PORT)),
            ],
            Component::San => std::iter::once("san".into())
                .chain(san::args(&self.paths.dir(), &self.paths.disks(), self.logs))
                .collect(),
        }
    }
}

/// Who the API server is to the APIs that it passes requests on to.
const FRONT_PROXY: &str = "front-proxy-client";
/// 3.4 s measured on an idle machine; several times that beside a build.
const API_DEADLINE: Duration = Duration::from_secs(90);
