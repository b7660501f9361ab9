//! The client of the node's `bascule-watchdog`: enlists this volume while a writer is open, and
//! withdraws it otherwise.
//!
//! The heartbeat publishes the kind of watchdog that resets this node, and the other nodes base
//! fence proofs on it. So the kind is always the last answer of `bascule-watchdog`, and `None` when
//! that process cannot be reached or when its timeout is too long for the volume's timings.

use std::time::Duration;

use bascule_ipc::volume::WatchdogKind as IpcKind;
use bascule_ipc::watchdog::{Request, Response};
use bascule_ipc::{Connection, IpcError};
use bascule_volume_format::{Fencing, WatchdogKind};
use bascule_volume_protocol::Rules;
use bascule_volume_protocol::watchdog_policy::timeout_fits;

use crate::volume_context::VolumeContext;

/// Enlists or withdraws this volume, according to the open writers, and stores the kind of watchdog
/// that `bascule-watchdog` reports.
pub fn refresh(context: &VolumeContext) {
    let call = context.watchdog_call.lock();
    // Under LeaseOnly no watchdog resets the node: an expired lease only stalls guests.
    let enlisted = is_required(context) && context.state().writers.must_be_watched();
    let kind = if enlisted {
        enlist(context).unwrap_or(WatchdogKind::None)
    } else {
        let volume = context.superblock.volume;
        call_and_check(context, &Request::Withdraw { volume }).unwrap_or(WatchdogKind::None)
    };
    let kind = if is_required(context) {
        kind
    } else {
        WatchdogKind::None
    };
    if context.state().watchdog != kind {
        tracing::info!(?kind, "the node's watchdog kind changed");
        // Before the next call: a writer that opens decides by the last answer.
        context.update(|state| state.watchdog = kind);
    }
    drop(call);
}

/// Whether the fencing mode of this volume relies on a watchdog.
#[must_use]
pub fn is_required(context: &VolumeContext) -> bool {
    context.superblock.fencing == Fencing::Watchdog
}

/// Enlists this volume: from then on the node is reset when the volume's lease expires.
///
/// # Errors
/// The reason for status messages: `bascule-watchdog` is unreachable, refused, or its timeout is too long.
pub fn enlist(context: &VolumeContext) -> Result<WatchdogKind, String> {
    let enlist = Request::Enlist {
        volume: context.superblock.volume,
        gate_page: context.gate.path().to_owned(),
        lease_until: None,
    };
    call_and_check(context, &enlist)
}

fn call_and_check(context: &VolumeContext, request: &Request) -> Result<WatchdogKind, String> {
    let response = call(context, request).map_err(|error| error.to_string())?;
    match response {
        Response::Status {
            kind, timeout_ms, ..
        } => {
            // One keepalive may be late by a whole timeout: the safe time must have room for two.
            let timings = &context.superblock.timings;
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

fn call(context: &VolumeContext, request: &Request) -> Result<Response, IpcError> {
    let mut connection = Connection::connect(&context.config.watchdog_sock, CALL_TIMEOUT)?;
    let (response, _) = connection.call(request)?;
    Ok(response)
}

/// For each step of one call; `bascule-watchdog` is on this host.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
