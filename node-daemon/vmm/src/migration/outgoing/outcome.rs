//! How an attempt ends at the source.

use std::time::Duration;

use bascule_ipc::vm::MigrationPhase;
use bascule_migrate::Frame;
use bascule_migrate::wire::{Abort, AbortReason, Committed};
use bascule_types::Ownership;

use super::{Driver, OutgoingEnd, cancelled};
use crate::dirty::DirtyTracker as _;
use crate::migration::control::millis;
use crate::migration::fault::FaultPoint;

/// Longest wait for the destination's `Running`. Only the measured downtime depends on it.
const RUNNING_TIMEOUT: Duration = Duration::from_secs(5);

impl Driver<'_> {
    /// Resumes the guest, before any clean-up.
    pub(super) fn resume_source(
        mut self,
        cause: Abort,
        ownership: Option<Ownership>,
    ) -> OutgoingEnd {
        if let Err(error) = self.guest.resume(ownership) {
            tracing::warn!(%error, "the guest could not be resumed");
        }
        if let Some((stopped, _)) = self.stopped.take() {
            tracing::info!(after = ?stopped.elapsed(), "the guest runs on at the source");
        }
        if let Err(error) = self.machine.dirty().stop() {
            tracing::warn!(%error, "the dirty log stays on");
        }
        let failure = if self.control.is_cancelled() {
            cancelled()
        } else {
            cause
        };
        if let Some(channel) = &mut self.channel {
            channel.abort(&failure);
        }
        let phase = match failure.reason {
            AbortReason::Cancelled => MigrationPhase::Cancelled,
            AbortReason::NotConverging => MigrationPhase::NotConverging,
            _ => MigrationPhase::Failed,
        };
        tracing::warn!(reason = ?failure.reason, text = %failure.text, "the migration failed");
        self.control.end(phase, Some(failure.text.clone()));
        OutgoingEnd::Kept { failure, ownership }
    }

    pub(super) fn depart(mut self, committed: Committed) -> OutgoingEnd {
        self.step("ownership transferred");
        // If this or the stream is lost, the destination reads the ownership record itself.
        if self.fault(FaultPoint::SourceCommitted).is_ok() {
            self.send_committed(committed);
        }
        self.control.end(MigrationPhase::Completed, None);
        OutgoingEnd::Departed {
            epoch: committed.epoch,
        }
    }

    fn send_committed(&mut self, committed: Committed) {
        let Some(channel) = &mut self.channel else {
            return;
        };
        let sent = channel
            .set_timeout(RUNNING_TIMEOUT)
            .and_then(|()| channel.send(&Frame::Committed(committed)));
        if let Err(error) = sent {
            tracing::warn!(%error, "the commit was not sent; the destination reads the ownership record itself");
            return;
        }
        match channel.receive() {
            Ok(Frame::Running { resume }) => {
                let downtime = self.stopped.map(|(stopped, _)| stopped.elapsed());
                tracing::info!(?downtime, ?resume, steps = ?self.steps, "the guest runs at the destination");
                self.control
                    .update(|status| status.downtime_ms = downtime.map(millis));
            }
            Ok(other) => tracing::warn!(kind = ?other.kind(), "unexpected after the commit"),
            Err(error) => tracing::warn!(%error, "the destination did not say that it runs"),
        }
    }

    pub(super) fn terminate(self) -> OutgoingEnd {
        let failure = "another node owns the VM";
        self.control
            .end(MigrationPhase::Failed, Some(failure.to_owned()));
        OutgoingEnd::Lost
    }
}
