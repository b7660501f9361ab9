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

/// How long the source waits for the destination to say that it runs. Only the measured downtime
/// depends on it.
const RUNNING_TIMEOUT: Duration = Duration::from_secs(5);

impl Driver<'_> {
    /// The guest runs on here, before anything else is done.
    pub(super) fn resume_source(
        mut self,
        because: Abort,
        ownership: Option<Ownership>,
    ) -> OutgoingEnd {
        if let Err(error) = self.guest.resume() {
            tracing::warn!(%error, "the guest does not run on");
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
            because
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

    pub(super) fn depart(mut self, word: Committed) -> OutgoingEnd {
        self.step("row transferred");
        // If this or the stream is lost, the destination asks its own volume.
        if self.fault(FaultPoint::SourceCommitted).is_ok() {
            self.tell_committed(word);
        }
        self.control.end(MigrationPhase::Completed, None);
        OutgoingEnd::Departed { epoch: word.epoch }
    }

    fn tell_committed(&mut self, word: Committed) {
        let Some(channel) = &mut self.channel else {
            return;
        };
        let told = channel
            .set_timeout(RUNNING_TIMEOUT)
            .and_then(|()| channel.send(&Frame::Committed(word)));
        if let Err(error) = told {
            tracing::warn!(%error, "the destination was not told; it asks its volume");
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
        let failure = "the VM's row is somebody else's";
        self.control
            .end(MigrationPhase::Failed, Some(failure.to_owned()));
        OutgoingEnd::Lost
    }
}
