//! Sends the source's memory to its channel.

use std::io;
use std::time::{Duration, Instant};

use bascule_migrate::precopy::Pacer;
use bascule_migrate::wire::BatchBuilder;
use bascule_types::Bytes;

use crate::migration::channel::Channel;
use crate::migration::control::MigrationControl;
use crate::migration::copy::Sink;

/// Sends batches within the bandwidth cap.
pub(super) struct ChannelSink<'a> {
    pub(super) channel: &'a mut Channel,
    pub(super) control: &'a MigrationControl,
    /// None once the guest is stopped: the last pass is not capped.
    pub(super) pacer: Option<&'a mut Pacer>,
    pub(super) started: Instant,
    pub(super) sent: &'a mut Bytes,
    pub(super) paced: &'a mut Duration,
    pub(super) deadline: Option<Instant>,
}

impl Sink for ChannelSink<'_> {
    fn take(&mut self, batch: &mut BatchBuilder) -> io::Result<()> {
        if self.control.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.channel.set_timeout(left)?;
        }
        let sent = Bytes(self.channel.send_batch(batch)?);
        self.sent.0 += sent.0;
        let bytes = *self.sent;
        self.control.update(|status| status.bytes = bytes);
        if let Some(pacer) = &mut self.pacer {
            let wait = pacer.sent(sent, self.started.elapsed());
            *self.paced += wait;
            self.control.wait(wait);
        }
        Ok(())
    }
}
