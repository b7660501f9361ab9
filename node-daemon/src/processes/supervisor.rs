//! The node's supervisor. It holds no VM state of its own: it reads all state from the processes or
//! from their run directories, so that a restarted daemon knows as much as before.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use bascule_node_api::command::RejectReason;
use bascule_types::{PortRange, UserRange};

use super::launcher::Launcher;
use super::restart_backoff::RestartBackoff;
use crate::config::ImageSite;
use crate::identity::{Identity, certificate};
use crate::paths::Paths;

/// The node's supervisor.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) paths: Paths,
    pub(crate) identity: Identity,
    /// The address at which other nodes reach this node.
    pub(crate) address: IpAddr,
    pub(crate) launcher: Launcher,
    pub(crate) bridges: BTreeMap<String, String>,
    pub(crate) host_files: BTreeMap<String, PathBuf>,
    pub(crate) image_site: ImageSite,
    pub(crate) watchdog: Option<PathBuf>,
    pub(crate) allow_softdog: bool,
    /// The users of VM processes; none without root, where they have the user of this process.
    pub(crate) users: Option<UserRange>,
    /// Where VM processes of this node wait for live migrations.
    pub(crate) migration_ports: PortRange,
    /// Volume processes that were started again.
    pub(crate) restart_backoff: Mutex<RestartBackoff>,
    /// The watchdog's process, when it was started again.
    pub(crate) watchdog_backoff: Mutex<RestartBackoff>,
    /// Processes that this daemon started, kept to be reaped.
    children: Mutex<Vec<Child>>,
}

/// Why a command cannot be executed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Rejection {
    pub(crate) reason: RejectReason,
    pub(crate) message: String,
}

impl Rejection {
    pub(crate) fn new(reason: RejectReason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

impl From<anyhow::Error> for Rejection {
    fn from(error: anyhow::Error) -> Self {
        Self::new(RejectReason::Failed, format!("{error:#}"))
    }
}

/// The parameters of a supervisor that are not in [`crate::config::NodeConfig`].
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) identity: Identity,
    pub(crate) address: IpAddr,
    pub(crate) launcher: Launcher,
}

impl Supervisor {
    pub(crate) fn new(config: &crate::config::NodeConfig, parts: Parts) -> Result<Self> {
        let paths = Paths::new(&config.run_dir, &config.state_dir);
        let folders = [
            paths.vms(),
            paths.vm_locks(),
            paths.volumes(),
            paths.imports(),
            paths.logs(),
        ];
        for folder in folders {
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        let users = config.users_of_vms();
        if let Some(range) = users {
            certificate::share(&paths, range.shared_group())?;
        }
        Ok(Self {
            paths,
            identity: parts.identity,
            address: parts.address,
            launcher: parts.launcher,
            bridges: config.bridges(),
            host_files: config.host_files(),
            image_site: config.image_site(),
            watchdog: config.watchdog.clone(),
            allow_softdog: config.allow_softdog,
            users,
            migration_ports: config.migration_ports,
            restart_backoff: Mutex::default(),
            watchdog_backoff: Mutex::default(),
            children: Mutex::default(),
        })
    }

    /// The supervisor of the same node under a new identity. The processes of the earlier one go over to
    /// it, and each volume stays attached under the UID that it was attached with.
    pub(crate) fn under(&self, identity: Identity) -> Self {
        let children =
            std::mem::take(&mut *self.children.lock().unwrap_or_else(PoisonError::into_inner));
        Self {
            paths: self.paths.clone(),
            identity,
            address: self.address,
            launcher: self.launcher.clone(),
            bridges: self.bridges.clone(),
            host_files: self.host_files.clone(),
            image_site: self.image_site.clone(),
            watchdog: self.watchdog.clone(),
            allow_softdog: self.allow_softdog,
            users: self.users,
            migration_ports: self.migration_ports,
            restart_backoff: Mutex::default(),
            watchdog_backoff: Mutex::default(),
            children: Mutex::new(children),
        }
    }

    pub(crate) fn adopt_child(&self, child: Child) {
        self.children
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(child);
    }

    /// Reaps the child processes that have ended.
    pub(crate) fn reap(&self) {
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
}

/// Whether a process exists and is no zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            stat.rsplit_once(')')
                .map(|(_, rest)| !rest.starts_with(" Z"))
        })
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    impl Supervisor {
        /// A supervisor of a node with directories below `folder` and no programs.
        pub(crate) fn test(folder: &std::path::Path) -> Self {
            let TestCli { mut config } = TestCli::parse_from(["test"]);
            config.run_dir = folder.join("run");
            config.state_dir = folder.join("state");
            let identity = Identity {
                node: bascule_types::NodeUid::random(),
                name: "n1".to_owned(),
                cluster: bascule_types::ClusterId::random(),
            };
            let parts = Parts {
                identity,
                address: std::net::Ipv6Addr::LOCALHOST.into(),
                launcher: Launcher::new(&config, false, false).unwrap(),
            };
            Self::new(&config, parts).unwrap()
        }

        /// The same with cgroups, and with a `bascule-node` that writes down its arguments, its standard input and
        /// its environment and does nothing; [`Self::launched`] has the arguments, [`Self::recorded`] all three.
        pub(crate) fn recording(folder: &std::path::Path) -> Self {
            let mut node = Self::test(folder);
            node.launcher.programs = folder.join("programs");
            node.launcher.cgroups = true;
            // Not written by this process: a program that is open for writing, also in a child of another
            // thread that has not executed yet, cannot be executed.
            let install = r#"mkdir "$1" && cat >"$1/bascule-node" && chmod +x "$1/bascule-node""#;
            let mut shell = std::process::Command::new("sh")
                .args(["-c", install, "sh"])
                .arg(&node.launcher.programs)
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut script = shell.stdin.take().unwrap();
            std::io::Write::write_all(&mut script, RECORDER.as_bytes()).unwrap();
            drop(script);
            assert!(shell.wait().unwrap().success());
            node
        }

        /// The arguments of every call of `bascule-node` that has ended, one a line.
        pub(crate) fn launched(&self) -> String {
            self.recorded("calls")
        }

        /// What every call of `bascule-node` that has ended got: `calls`, `input` or `environment`.
        pub(crate) fn recorded(&self, what: &str) -> String {
            let record = format!("bascule-node.{what}");
            fs::read_to_string(self.launcher.programs.join(record)).unwrap_or_default()
        }
    }

    /// The arguments come last: they tell that the rest is there.
    const RECORDER: &str = "#!/bin/sh
cat >>\"$0.input\"
tr '\\0' '\\n' </proc/$$/environ >>\"$0.environment\"
echo \"$@\" >>\"$0.calls\"
";

    #[derive(Debug, clap::Parser)]
    struct TestCli {
        #[command(flatten)]
        config: crate::config::NodeConfig,
    }

    #[test]
    fn a_zombie_is_not_alive() {
        assert!(is_alive(std::process::id()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let gone = crate::wait::wait_for(std::time::Duration::from_secs(10), || {
            (!is_alive(child.id())).then_some(())
        });
        assert!(gone.is_some());
        child.wait().unwrap();
        assert!(!is_alive(child.id()));
    }
}
