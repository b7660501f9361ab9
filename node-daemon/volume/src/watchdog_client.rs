//! The client of the node's `bascule-watchdog`: enlists this volume while a write may be in flight, and
//! withdraws it when no writer is open, or when the lease has lapsed and every writer is drained.
//!
//! The heartbeat publishes the kind of watchdog that resets this node, and the other nodes base
//! fence proofs on it. So the kind is always the last answer of `bascule-watchdog`, and `None` when
//! that process cannot be reached or when its timeout is too long for the volume's timings. What follows
//! from the answers is decided by [`bascule_volume_protocol::Enlistment`].

use std::time::Duration;

use bascule_ipc::volume::WatchdogKind as IpcKind;
use bascule_ipc::watchdog::{Request, Response};
use bascule_types::BootTime;
use bascule_volume_format::WatchdogKind;
use bascule_volume_gate::writer_page::is_closed_for_certain;
use bascule_volume_protocol::watchdog_policy::timeout_fits;
use bascule_volume_protocol::{WatchdogCall, WriterActivity};

use crate::volume_context::{State, VolumeContext};

/// Enlists or withdraws this volume, according to its writers and its lease, and stores what
/// `bascule-watchdog` answers. Returns what it decided by.
pub fn refresh(context: &VolumeContext) -> WriterActivity {
    let guard = context.watchdog_call.lock();
    // One lock for the decision and what it closes: no later lease is published before both.
    let (activity, call) = context.update(|state| {
        let activity = activity(context, state);
        let (decided, call) = state.enlistment.clone().decide(&activity);
        if decided.is_withdrawn() && activity.any && !state.enlistment.is_withdrawn() {
            tracing::info!(
                "the lease has lapsed and no write is in flight: withdrawing the volume from the \
                 watchdog until there is a new lease"
            );
        }
        state.enlistment = decided;
        (activity, call)
    });
    if let Err(reason) = send(context, call) {
        tracing::debug!(?call, reason, "the watchdog did not grant a request");
    }
    drop(guard);
    activity
}

/// Sends `call`, stores its answer, and opens the gates that may open now. The caller holds
/// [`VolumeContext::watchdog_call`].
///
/// # Errors
/// The reason for status messages: `bascule-watchdog` is unreachable, refused, or its timeout is too long.
pub fn send(context: &VolumeContext, call: WatchdogCall) -> Result<WatchdogKind, String> {
    let volume = context.superblock.volume;
    // One request at a time: this one was decided after every earlier one was answered, or given up.
    let decided_at = Some(context.now());
    let request = match call {
        WatchdogCall::Enlist { lease_until } => Request::Enlist {
            volume,
            gate_page: context.gate.path().to_owned(),
            lease_until,
            decided_at,
        },
        WatchdogCall::Withdraw => Request::Withdraw { volume, decided_at },
    };
    let answer = call_and_check(context, &request);
    let kind = answer.as_ref().ok().copied();
    context.change_enlistment(|enlistment| enlistment.answered(call, kind));
    answer
}

/// What the writers do now.
fn activity(context: &VolumeContext, state: &mut State) -> WriterActivity {
    // The clock before the writers' pages.
    let now = context.now();
    let shown = context.gate.view().expiry;
    WriterActivity {
        any: state.writers.must_be_watched(),
        closed: is_closed_for_certain(now, shown),
        drained: state.writers.are_all_drained(),
        lease_until: state.lease_until(now),
    }
}

/// When to refresh next, at the latest, after a refresh that saw `activity` at `now`: soon after the end of
/// the lease, and often while a lapsed volume still has a writer that is not drained.
#[must_use]
pub fn next_refresh(activity: &WriterActivity, is_withdrawn: bool, now: BootTime) -> Duration {
    match activity.lease_until {
        _ if !activity.any || is_withdrawn => INTERVAL,
        Some(until) => INTERVAL.min(until.since(now) + INTERVAL_LAPSED),
        None => INTERVAL_LAPSED,
    }
}

/// Whether the fencing mode of this volume relies on a watchdog.
#[must_use]
pub fn is_required(context: &VolumeContext) -> bool {
    context.superblock.fencing == bascule_volume_format::Fencing::Watchdog
}

fn call_and_check(context: &VolumeContext, request: &Request) -> Result<WatchdogKind, String> {
    let response = context.host.call_watchdog(request);
    let response = response.map_err(|error| error.to_string())?;
    match response {
        Response::Status {
            kind, timeout_ms, ..
        } => {
            // One keepalive may be late by a whole timeout: the safe time must have room for two.
            let timings = &context.superblock.timings;
            let fits = timeout_fits(
                context.config.rules,
                timings,
                Duration::from_millis(timeout_ms),
            );
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

/// Between two refreshes.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same while the lease has lapsed: a fraction of a watchdog's timeout, longer than a lease takes to
/// be over for certain.
const INTERVAL_LAPSED: Duration = Duration::from_millis(150);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lapsed_volume_is_looked_at_soon_and_a_withdrawn_one_at_leisure() {
        let now = BootTime(5_000_000_000);
        let lapsed = WriterActivity {
            any: true,
            ..WriterActivity::default()
        };
        assert_eq!(next_refresh(&lapsed, false, now), INTERVAL_LAPSED);
        assert_eq!(next_refresh(&lapsed, true, now), INTERVAL);
        let until = |left| WriterActivity {
            lease_until: Some(now.after(left)),
            ..lapsed
        };
        assert_eq!(next_refresh(&until(INTERVAL * 3), false, now), INTERVAL);
        let short = Duration::from_millis(50);
        let wait = next_refresh(&until(short), false, now);
        assert_eq!(wait, short + INTERVAL_LAPSED);
        assert_eq!(
            next_refresh(&WriterActivity::default(), false, now),
            INTERVAL
        );
    }
}
