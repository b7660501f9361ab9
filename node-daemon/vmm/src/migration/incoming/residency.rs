//! When the destination's memory is resident: the source is told, and waits for it.

use std::time::Duration;

use bascule_migrate::Frame;
use bascule_migrate::destination::ExpectMemory;
use bascule_migrate::wire::{Abort, AbortReason};

use super::super::channel::Channel;
use super::super::prefault::Progress;
use super::{Receiver, cancelled, send};

/// Interval at which a source that waits for this side's memory is told that the stream is up; a part of its
/// timeout.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

impl Receiver<'_> {
    /// A source that cannot wait later waits before the first round.
    pub(super) fn begin_rounds(
        &self,
        channel: &mut Channel,
        phase: ExpectMemory,
    ) -> Result<ExpectMemory, Abort> {
        if !phase.is_resident_first() {
            return Ok(phase);
        }
        self.await_memory(channel)?;
        send(channel, &Frame::RoundAck { round: 0 })?;
        Ok(phase.resident())
    }

    /// Waits until all memory is resident, and returns how long that took.
    fn await_memory(&self, channel: &mut Channel) -> Result<Duration, Abort> {
        loop {
            match self.memory.wait(KEEPALIVE_INTERVAL) {
                Progress::Resident { took } => return Ok(took),
                Progress::Failed(text) => return Err(Abort::new(AbortReason::Internal, text)),
                Progress::UnderWay if self.control.is_cancelled() => return Err(cancelled()),
                // A source takes it for an answer that came late.
                Progress::UnderWay => send(channel, &Frame::Pong { token: 0 })?,
            }
        }
    }

    /// After a round: `Resident`, unless it was sent already.
    pub(super) fn say_resident(
        &self,
        channel: &mut Channel,
        phase: ExpectMemory,
    ) -> Result<ExpectMemory, Abort> {
        if !phase.is_pending() {
            return Ok(phase);
        }
        let took = self.await_memory(channel)?;
        tracing::info!(?took, "the guest's memory is resident");
        send(channel, &Frame::Resident { took })?;
        Ok(phase.resident())
    }

    /// Fails as soon as it is known that the memory is not there.
    pub(super) fn check_memory(&self) -> Result<(), Abort> {
        match self.memory.progress() {
            Progress::Failed(text) => Err(Abort::new(AbortReason::Internal, text)),
            Progress::UnderWay | Progress::Resident { .. } => Ok(()),
        }
    }
}
