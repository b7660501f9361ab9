//! `bascule-node host-shutdown`: shuts the guests of this node down before the host goes, as a service unit
//! does (`examples/bascule-guests.service`, `docs/host-shutdown.md`).

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::vm::VmConfig;
use bascule_types::VmUid;
use rustix::process::{Pid, Signal, kill_process};

use crate::config::NodeConfig;
use crate::files::{self, names_in};
use crate::output::tell;
use crate::paths::Paths;
use crate::processes::supervisor::is_alive;
use crate::processes::vms::recorded_pid;
use crate::wait::wait_for;

/// `bascule-node host-shutdown`
#[derive(Debug, clap::Args)]
pub(crate) struct HostShutdownArgs {
    #[command(flatten)]
    config: NodeConfig,
}

/// Prevents further starts on this node, sends SIGTERM to all of its VM processes, and waits until they have
/// ended.
pub(crate) fn host_shutdown(args: &HostShutdownArgs) -> Result<()> {
    let paths = Paths::new(&args.config.run_dir, &args.config.state_dir);
    if !paths.vms().exists() {
        return Ok(());
    }
    files::replace(&paths.shutting_down(), b"", 0o644)?;
    let limit = longest_timeout(&paths)? + MARGIN;
    let mut told = BTreeSet::new();
    // Looks again: a start that was under way has its process now.
    let ended = wait_for(limit, || match tell_all(&paths, &mut told) {
        Ok(left) if left.is_empty() => Some(Ok(())),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    });
    match ended {
        Some(ended) => ended,
        None => {
            let left: Vec<String> = processes(&paths)?
                .iter()
                .map(|(vm, pid)| format!("{vm} (process {pid})"))
                .collect();
            bail!("these VMs are not off: {}", left.join(", "))
        }
    }
}

/// Sends SIGTERM to the processes that have not got it; returns those that are still there.
fn tell_all(paths: &Paths, told: &mut BTreeSet<u32>) -> Result<Vec<(VmUid, u32)>> {
    let left = processes(paths)?;
    for (vm, pid) in &left {
        if !told.insert(*pid) {
            continue;
        }
        let raw = i32::try_from(*pid).ok().and_then(Pid::from_raw);
        match kill_process(raw.context("an invalid process id")?, Signal::TERM) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(errno).with_context(|| format!("signal process {pid}")),
        }
        tell(format_args!("Shutting down {vm} (process {pid})."));
    }
    Ok(left)
}

/// The VM processes of this node.
fn processes(paths: &Paths) -> Result<Vec<(VmUid, u32)>> {
    let mut found = Vec::new();
    for name in names_in(&paths.vms())? {
        let Ok(vm) = name.parse::<VmUid>() else {
            continue;
        };
        let folder = paths.vm(vm);
        let Some(pid) = recorded_pid(&folder).filter(|pid| is_alive(*pid)) else {
            continue;
        };
        // The id of a process that has ended may be that of another program by now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let config = folder.join("config.json");
        let ours = command
            .split(|byte| *byte == 0)
            .any(|argument| argument == config.as_os_str().as_encoded_bytes());
        if ours {
            found.push((vm, pid));
        }
    }
    Ok(found)
}

fn longest_timeout(paths: &Paths) -> Result<Duration> {
    let timeouts = processes(paths)?.into_iter().map(|(vm, _)| {
        let config = fs::read(paths.vm(vm).join("config.json")).ok();
        let config = config.and_then(|json| serde_json::from_slice::<VmConfig>(&json).ok());
        config.map_or(VmConfig::SHUTDOWN_TIMEOUT, |config| {
            config.shutdown_timeout()
        })
    });
    Ok(timeouts.max().unwrap_or_default())
}

/// For draining devices and releasing ownerships after the guests' own time.
const MARGIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct TestCli {
        #[command(flatten)]
        args: HostShutdownArgs,
    }

    #[test]
    fn every_vm_process_gets_sigterm_and_no_other_process_and_then_no_guest_is_started() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let line = ["test", "--run-dir", run.to_str().unwrap()];
        let args = TestCli::parse_from(line).args;
        host_shutdown(&args).unwrap();
        assert!(!run.exists(), "a node without guests is left alone");
        let paths = Paths::new(&run, folder.path());
        let start = |byte, argument: &std::ffi::OsStr| {
            let vm_dir = paths.vm(VmUid::from_bytes([byte; 16]));
            fs::create_dir_all(&vm_dir).unwrap();
            let mut command = Command::new("sh");
            let command = command.args(["-c", "read line"]).arg(argument);
            let child = command.stdin(Stdio::piped()).spawn().unwrap();
            fs::write(vm_dir.join("pid"), child.id().to_string()).unwrap();
            let shown = || fs::read(format!("/proc/{}/cmdline", child.id())).unwrap();
            while shown().is_empty() {
                std::thread::yield_now();
            }
            child
        };
        let config = paths.vm(VmUid::from_bytes([1; 16])).join("config.json");
        let mut vm = start(1, config.as_os_str());
        let mut other = start(2, "another".as_ref());
        host_shutdown(&args).unwrap();
        assert!(!vm.wait().unwrap().success(), "ended by the signal");
        assert!(other.try_wait().unwrap().is_none());
        drop(other.stdin.take());
        other.wait().unwrap();
        assert!(paths.shutting_down().exists());
    }
}
