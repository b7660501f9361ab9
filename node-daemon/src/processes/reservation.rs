//! Ending the hold process of a reservation pod when its VM has left.
//!
//! The hold process ignores SIGTERM, so that a drain waits, and the kubelet does not act on a
//! shortened grace period. The daemon sees the host's processes, finds the pod's by the pod's UID
//! in its cgroup path, and sends [`END_SIGNAL`]. PID 1 of a PID namespace
//! receives from outside only signals that it handles, and `bascule-hold` handles this one.

use std::fs;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// The signal that `bascule-hold` ends on.
pub(crate) const END_SIGNAL: Signal = Signal::USR1;

/// Signals every `bascule-hold` of this pod and returns their number. Zero is no error: the pod has
/// ended already.
pub(crate) fn end(pod_uid: &str) -> Result<usize> {
    let mut ended = 0;
    for entry in fs::read_dir("/proc").context("read /proc")? {
        let entry = entry.context("read /proc")?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        // The process may end between two reads; then it needs no signal.
        let Ok(cgroups) = fs::read_to_string(entry.path().join("cgroup")) else {
            continue;
        };
        let Ok(command) = fs::read_to_string(entry.path().join("comm")) else {
            continue;
        };
        if command.trim_end() != HOLD_COMMAND || !names_pod(&cgroups, pod_uid) {
            continue;
        }
        let Some(pid) = Pid::from_raw(pid) else {
            continue;
        };
        match kill_process(pid, END_SIGNAL) {
            Ok(()) => ended += 1,
            Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(errno).context("signal the hold process"),
        }
    }
    Ok(ended)
}

/// Whether a cgroup table is that of the pod. The cgroupfs driver writes the UID as it is, the
/// systemd driver with `_` for `-`.
fn names_pod(cgroups: &str, pod_uid: &str) -> bool {
    let systemd = pod_uid.replace('-', "_");
    !pod_uid.is_empty()
        && cgroups.lines().any(|line| {
            line.contains(&format!("pod{pod_uid}")) || line.contains(&format!("pod{systemd}"))
        })
}

/// The hold process, as the kernel names it.
const HOLD_COMMAND: &str = "bascule-hold";

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b1c2d3e-aaaa-bbbb-cccc-0123456789ab";

    #[test]
    fn a_pod_is_found_under_both_cgroup_drivers() {
        let cgroupfs = format!("5:memory:/kubepods/burstable/pod{UID}/abcdef");
        let systemd = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0b1c2d3e_aaaa_bbbb_cccc_0123456789ab.slice/cri-containerd-abc.scope";
        assert!(names_pod(&cgroupfs, UID));
        assert!(names_pod(systemd, UID));
    }

    #[test]
    fn another_pod_and_an_empty_uid_match_nothing() {
        assert!(!names_pod(
            "0::/kubepods/pod11111111-2222-3333-4444-555555555555/x",
            UID
        ));
        assert!(!names_pod("0::/kubepods/pod/x", ""));
    }

    #[test]
    fn ending_a_pod_that_does_not_exist_is_no_error() {
        assert_eq!(end(UID).unwrap(), 0);
    }
}
