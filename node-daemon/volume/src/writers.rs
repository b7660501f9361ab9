//! Opening and closing writers, and the writers thread, which detects writers that died.
//!
//! A writer is a process that holds the device for a VM. The volume is
//! enlisted with the node's watchdog before a writer gets the device, and withdrawn after the last
//! writer has closed or settled.

use std::io;
use std::time::Duration;

use bascule_types::VmUid;
use bascule_volume_format::WatchdogKind;
use bascule_volume_gate::boot_time_now;

use crate::sleep_inhibitor::SleepInhibitor;
use crate::volume_context::VolumeContext;
use crate::watchdog_client;

/// Once a second until the process stops: settles the writers of dead processes and refreshes the
/// watchdog enlistment.
pub fn run(context: &VolumeContext) {
    let mut inhibitor = SleepInhibitor::new();
    while !context.is_stopping() {
        let idle = context.state().writers.has_gone() && device_is_idle(context);
        let settle = context.superblock.timings.settle;
        context.update(|state| state.writers.reap(boot_time_now(), settle, idle));
        watchdog_client::refresh(context);
        inhibitor.set(context.state().writers.must_be_watched());
        context.wait_until(INTERVAL, |state| state.stopping);
    }
}

/// Whether the kernel reported no write in flight on the device in at least one of
/// [`IDLE_SAMPLES`] samples. A file has no such counter: only the settle time covers its writes,
/// which is one reason why a file backs a volume only in a lab.
fn device_is_idle(context: &VolumeContext) -> bool {
    !context.device.is_block()
        || (0..IDLE_SAMPLES).any(|_| {
            std::thread::park_timeout(IDLE_SAMPLE_INTERVAL);
            context.device.writes_in_flight() == Some(0)
        })
}

/// Records process `pid` as a writer of `vm`, after enlisting the volume with the watchdog. While
/// the heartbeat publishes a watchdog, a writer that cannot be enlisted is refused. Returns whether
/// the writer is new.
///
/// # Errors
/// The reason for an error message; the process must not get the device.
pub fn open(context: &VolumeContext, vm: VmUid, pid: u32) -> Result<bool, String> {
    let call = context.watchdog_call.lock();
    let is_new = context
        .update(|state| state.writers.open(vm, pid))
        .map_err(|error| format!("cannot record the writer: {error}"))?;
    let enlisted = if watchdog_client::is_required(context) {
        watchdog_client::enlist(context)
    } else {
        Ok(WatchdogKind::None)
    };
    let is_watched = matches!(enlisted, Ok(kind) if kind != WatchdogKind::None);
    let is_allowed =
        !watchdog_client::is_required(context) || is_published_truly(context, is_watched);
    drop(call);
    match enlisted {
        _ if is_allowed => Ok(is_new),
        refused => {
            let error = refused.err().unwrap_or_else(|| "there is none".to_owned());
            if is_new && let Err(error) = close(context, vm, pid) {
                tracing::warn!(%vm, pid, %error, "cannot remove a writer that was not opened");
            }
            Err(format!("the watchdog does not watch this volume: {error}"))
        }
    }
}

/// Whether no other node counts on a watchdog that does not watch this writer. Waits for a heartbeat
/// that takes back what an earlier one said.
fn is_published_truly(context: &VolumeContext, is_watched: bool) -> bool {
    let may_come = is_watched || context.state().watchdog == WatchdogKind::None;
    may_come
        && context.wait_until(context.superblock.timings.lease, |state| {
            state.published_watchdog.allows_writer(is_watched)
        })
}

/// Removes a writer whose submitted writes have all completed.
///
/// # Errors
/// Those of the run directory; the writer then still counts as open.
pub fn close(context: &VolumeContext, vm: VmUid, pid: u32) -> io::Result<()> {
    let closed = context.update(|state| state.writers.close(vm, pid));
    watchdog_client::refresh(context);
    closed
}

const INTERVAL: Duration = Duration::from_secs(1);
/// 50 samples at 2 ms: at most 100 ms per second, and only while a dead writer is not settled.
const IDLE_SAMPLES: u32 = 50;
const IDLE_SAMPLE_INTERVAL: Duration = Duration::from_millis(2);
