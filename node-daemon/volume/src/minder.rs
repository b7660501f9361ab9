//! The minder thread: writers that died, and the node's watchdog.
//!
//! The heartbeat says what resets this node, and others count on it. So the kind is what the
//! watchdog's owner says at this moment, and `None` when it cannot be asked, or when its timeout is
//! too long for the volume's times.

use std::time::Duration;

use bascule_ipc::volume::WatchdogKind as IpcKind;
use bascule_ipc::watchdog::{Request, Response};
use bascule_ipc::{Connection, IpcError};
use bascule_volume_format::{Fencing, WatchdogKind};
use bascule_volume_gate::boot_time_now;
use bascule_volume_protocol::Rules;
use bascule_volume_protocol::watchdog_policy::timeout_fits;

use crate::node::Node;

/// Minds until the process stops.
pub fn run(node: &Node) {
    while !node.is_stopping() {
        let quiet = node.state().writers.has_gone() && is_quiet(node);
        let settle = node.superblock.timings.settle;
        node.update(|state| state.writers.reap(boot_time_now(), settle, quiet));
        refresh(node);
        node.wait_until(INTERVAL, |state| state.stopping);
    }
}

/// Whether the kernel had no write in flight on the device at some moment: a busy device is looked
/// at several times. A file has no such count: there `settle` alone has to do, which is one reason
/// why a file is for a lab.
fn is_quiet(node: &Node) -> bool {
    !node.device.is_block()
        || (0..QUIET_LOOKS).any(|_| {
            std::thread::park_timeout(QUIET_PAUSE);
            node.device.writes_in_flight() == Some(0)
        })
}

/// Tells the watchdog's owner whether to watch this volume, and notes what it says.
pub fn refresh(node: &Node) {
    let talk = node.watchdog_talk.lock();
    // Under LeaseOnly nothing resets a node: a lapsed lease stalls guests, and no more.
    let watched = watchdog_counts(node) && node.state().writers.must_be_watched();
    let kind = if watched {
        enlist(node).unwrap_or(WatchdogKind::None)
    } else {
        let volume = node.superblock.volume;
        ask(node, &Request::Withdraw { volume }).unwrap_or(WatchdogKind::None)
    };
    drop(talk);
    let kind = if watchdog_counts(node) {
        kind
    } else {
        WatchdogKind::None
    };
    if node.state().watchdog != kind {
        tracing::info!(?kind, "watchdog");
        node.update(|state| state.watchdog = kind);
    }
}

/// Whether this volume's fencing counts on a watchdog.
#[must_use]
pub fn watchdog_counts(node: &Node) -> bool {
    node.superblock.fencing == Fencing::Watchdog
}

/// Has this volume's lease watched.
///
/// # Errors
/// Why not.
pub fn enlist(node: &Node) -> Result<WatchdogKind, String> {
    let enlist = Request::Enlist {
        volume: node.superblock.volume,
        gate_page: node.gate.path().to_owned(),
    };
    ask(node, &enlist)
}

fn ask(node: &Node, request: &Request) -> Result<WatchdogKind, String> {
    let response = call(node, request).map_err(|error| error.to_string())?;
    match response {
        Response::Status {
            kind, timeout_ms, ..
        } => {
            // One pet may come late by a whole timeout: T_safe must have room for two.
            let timings = &node.superblock.timings;
            let fits = timeout_fits(Rules::ENFORCED, timings, Duration::from_millis(timeout_ms));
            if kind != IpcKind::None && !fits {
                return Err(format!(
                    "the watchdog's timeout of {timeout_ms} ms is too long for this volume: the \
                     lease ({} ms) and twice the timeout must be less than its watch and watchdog \
                     times ({} ms) together",
                    timings.lease.as_millis(),
                    (timings.watch + timings.watchdog).as_millis()
                ));
            }
            Ok(match kind {
                IpcKind::Hardware => WatchdogKind::Hardware,
                IpcKind::Soft => WatchdogKind::Software,
                IpcKind::None => WatchdogKind::None,
            })
        }
        Response::Refused { reason } => Err(reason),
    }
}

fn call(node: &Node, request: &Request) -> Result<Response, IpcError> {
    let mut connection = Connection::connect(&node.config.watchdog_sock, STEP)?;
    let (response, _) = connection.call(request)?;
    Ok(response)
}

const INTERVAL: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_secs(1);
/// Together a tenth of a second, once a second, while a writer is gone.
const QUIET_LOOKS: u32 = 50;
const QUIET_PAUSE: Duration = Duration::from_millis(2);
