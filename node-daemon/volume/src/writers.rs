//! Opening and closing writers, and the writers thread, which detects writers that died.
//!
//! A writer is a process that holds the device for a VM. The volume is
//! enlisted with the node's watchdog before a writer gets the device, and withdrawn after the last
//! writer has closed or is proved complete.

use std::io;
use std::time::Duration;

use bascule_volume_format::WatchdogKind;
use bascule_volume_gate::boot_time_now;
use bascule_volume_protocol::WriterId;

use crate::block_device::Identity;
use crate::sleep_inhibitor::SleepInhibitor;
use crate::volume_context::VolumeContext;
use crate::watchdog_client;

/// Once a second until the process stops: asks the kernel whether the writes of dead processes are
/// complete, and refreshes the watchdog enlistment.
pub fn run(context: &VolumeContext) {
    let mut inhibitor = SleepInhibitor::new();
    while !context.is_stopping() {
        let settle = context.superblock.timings.settle;
        let dead = context.update(|state| state.writers.note_dead());
        for (writer, handed) in dead {
            let lock = context.device.writer_lock(writer, &handed);
            let now = boot_time_now();
            context.update(|state| state.writers.note_lock(writer, lock, now, settle));
        }
        watchdog_client::refresh(context);
        inhibitor.set(context.state().writers.must_be_watched());
        context.wait_until(INTERVAL, |state| state.stopping);
    }
}

/// Waits while what keeps `writer` from opening may end by itself, at most for `patience`.
pub fn await_earlier(context: &VolumeContext, writer: WriterId, shared: bool, patience: Duration) {
    context.wait_until(patience, |state| {
        let why = state.writers.why_not_opened(writer, shared);
        state.stopping || why.is_none_or(|(_, may_help)| !may_help)
    });
}

/// Records a writer, after enlisting the volume with the watchdog. Refused while a write of an earlier
/// writer of the VM may land: it would undo one of this writer. `shared` says that several importers
/// fill the VM's disks. While the heartbeat publishes a watchdog, a writer that cannot be enlisted is
/// refused. Returns whether the writer is new.
///
/// # Errors
/// The reason, for a person; the process must not get the device.
pub fn open(
    context: &VolumeContext,
    writer: WriterId,
    device: Identity,
    shared: bool,
) -> Result<bool, String> {
    let call = context.watchdog_call.lock();
    let is_new = context.update(|state| {
        if let Some((reason, _)) = state.writers.why_not_opened(writer, shared) {
            return Err(reason);
        }
        let opened = state.writers.open(writer, device);
        opened.map_err(|error| format!("cannot record the writer: {error}"))
    })?;
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
            if is_new && let Err(error) = close(context, writer) {
                tracing::warn!(?writer, %error, "cannot remove a writer that was not opened");
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
/// For an unclean writer, and those of the run directory; the writer then still counts as open.
pub fn close(context: &VolumeContext, writer: WriterId) -> io::Result<()> {
    let closed = context.update(|state| state.writers.close(writer));
    watchdog_client::refresh(context);
    closed
}

const INTERVAL: Duration = Duration::from_secs(1);
