//! Opening and closing writers, and the writers thread, which detects writers that died.
//!
//! A writer is a process that holds the device for a VM. The volume is enlisted with the node's watchdog
//! before a writer gets the device, and withdrawn after the last writer has closed or is proved complete.
//! It is also withdrawn while the lease has ended and no writer has a write in flight: a node is not
//! reset for a storage that stalls. It is enlisted again before the gates open.

use std::io;
use std::time::Duration;

use bascule_types::BootTime;
use bascule_volume_format::WatchdogKind;
use bascule_volume_protocol::{WatchdogCall, WriterId};

use crate::block_device::Identity;
use crate::volume_context::VolumeContext;
use crate::watchdog_client;

/// Once a second until the process stops, and when the lease has ended or is back: asks the kernel whether
/// the writes of dead processes are complete, and refreshes the watchdog enlistment.
pub fn run(context: &VolumeContext) {
    while !context.is_stopping() {
        let settle = context.superblock.timings.settle;
        for (writer, handed) in note_dead(context) {
            let lock = context.device.writer_lock(writer, &handed);
            let now = context.now();
            context.update(|state| state.writers.note_lock(writer, lock, now, settle));
        }
        let activity = watchdog_client::refresh(context);
        context.host.keep_awake(activity.any);
        let now = context.now();
        let is_withdrawn = context.state().enlistment.is_withdrawn();
        let interval = watchdog_client::next_refresh(&activity, is_withdrawn, now);
        // A new lease is no news to a refresh that saw one: if that could not open the gates, the next one
        // tries again after the interval.
        let had_lease = activity.lease_until.is_some();
        context.wait_until(interval, |state| {
            let is_awaited = !had_lease && !state.may_open_gates();
            state.stopping || is_awaited && state.lease_until(context.now()).is_some()
        });
    }
}

/// Notices which writers' processes have ended. Those whose writes are not known to be complete, with what they
/// were handed.
pub fn note_dead(context: &VolumeContext) -> Vec<(WriterId, Vec<Identity>)> {
    let lives = |writer: WriterId| context.host.start_time(writer.pid) == Some(writer.started);
    context.update(|state| state.writers.note_dead(&lives))
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
/// refused; so is a new one while the volume is withdrawn because its lease has ended. Returns whether the
/// writer is new.
///
/// # Errors
/// The reason, for a person; the process must not get the device.
pub fn open(
    context: &VolumeContext,
    writer: WriterId,
    device: Identity,
    shared: bool,
) -> Result<bool, String> {
    let guard = context.watchdog_call.lock();
    let (is_new, lease_until) = context.update(|state| {
        if let Some((reason, _)) = state.writers.why_not_opened(writer, shared) {
            return Err(reason);
        }
        let withdrawn = state.writers.must_be_watched() && state.enlistment.is_withdrawn();
        if withdrawn && !state.writers.is_known(writer) {
            return Err(WITHDRAWN.to_owned());
        }
        let opened = state.writers.open(writer, device);
        let is_new = opened.map_err(|error| format!("cannot record the writer: {error}"))?;
        let lease = state.lease_until(context.now());
        // The gate of a writer that has the device already opens when the lease is back.
        Ok((is_new, (!withdrawn).then_some(lease)))
    })?;
    let Some(lease_until) = lease_until else {
        return Ok(is_new);
    };
    let watched = if watchdog_client::is_required(context) {
        enlist(context, lease_until)
    } else {
        Ok(())
    };
    if watched.is_err() && is_new {
        let closed = context.update(|state| state.writers.close(writer));
        if let Err(error) = closed {
            tracing::warn!(?writer, %error, "cannot remove a writer that was not opened");
        }
    }
    drop(guard);
    watched.map(|()| is_new)
}

/// Has the volume watched for a writer that was recorded, or makes sure that no other node counts on that.
fn enlist(context: &VolumeContext, lease_until: Option<BootTime>) -> Result<(), String> {
    let before = context.state().enlistment.kind();
    let enlisted = watchdog_client::send(context, WatchdogCall::Enlist { lease_until });
    let is_watched = matches!(enlisted, Ok(kind) if kind != WatchdogKind::None);
    // Waits for a heartbeat that takes back what an earlier one said, if one may come.
    let patience = if is_watched || before == WatchdogKind::None {
        context.superblock.timings.lease
    } else {
        Duration::ZERO
    };
    let is_allowed = context.wait_until(patience, |state| {
        let may_name_one = state.published_watchdog.may_name_one();
        state.enlistment.may_admit(is_watched, may_name_one)
    });
    // It may be the reason that the gates waited for.
    context.change_enlistment(|enlistment| enlistment);
    if is_allowed {
        return Ok(());
    }
    let error = enlisted.err();
    let error = error.unwrap_or_else(|| "there is none".to_owned());
    Err(format!("the watchdog does not watch this volume: {error}"))
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

const WITHDRAWN: &str = "the lease of this node has ended, and the volume is not watched before there is \
                         a new one: try again";
