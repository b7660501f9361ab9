//! Resets by the nodes' watchdogs.

use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use bascule_e2e::kubernetes::Succession;
use bascule_e2e::wait_for;
use bascule_lab::{Lab, Node};

/// Their number on each node.
pub(crate) fn resets(lab: &Lab) -> Result<Vec<usize>> {
    let of = |node: Node<'_>| Ok(node.watchdog_resets()?.len());
    lab.nodes().map(of).collect()
}

/// Waits for the node's first reset after `before` earlier ones.
pub(crate) fn wait_reset(node: &Node<'_>, before: usize) -> Result<SystemTime> {
    wait_for("the watchdog to reset the node", RESET_LIMIT, || {
        Ok(node.watchdog_resets()?.get(before).copied())
    })
}

/// The old node's last write came before its reset, and the new node's first after it.
pub(crate) fn ensure_reset_between(reset: SystemTime, succession: &Succession) -> Result<()> {
    ensure!(
        succession.last < reset && reset < succession.first,
        "reset at {reset:?}, {succession:?}"
    );
    Ok(())
}

/// The watchdog's timeout, the reset of the machine, and a busy host.
const RESET_LIMIT: Duration = Duration::from_secs(60);
