//! The device-specific part of a virtio device: what its thread does with the queues.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use bascule_types::WriterState;
use serde_json::Value;

use super::queue::{QueueError, Virtqueue};
use super::shared::Shared;
use crate::guest_ram::GuestRam;

/// The queues of a device whose driver set DRIVER_OK, with what the handler needs to process them.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) ram: Arc<GuestRam>,
    /// By index; `None` for a queue that the driver did not enable.
    pub(crate) queues: Vec<Option<Virtqueue>>,
    pub(crate) features: u64,
    pub(crate) shared: Arc<Shared>,
}

/// Why a handler cannot continue.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandlerError {
    #[error("queue {queue}: {source}")]
    Queue {
        queue: usize,
        #[source]
        source: QueueError,
    },
    #[error("{what}: {source}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The device-specific processing of queues. Every method runs on the device's thread.
pub(crate) trait QueueHandler: Send + 'static {
    /// File descriptors to poll besides the queues' notifications, edge-triggered for reading and
    /// writing.
    fn watched(&self) -> Vec<RawFd>;

    /// The queues were just activated or restored, or processing resumes after a pause: the handler
    /// must process every queue and descriptor, because earlier notifications may be lost.
    fn start(&mut self, active: &mut Active) -> Result<(), HandlerError>;

    /// The driver notified a queue.
    fn queue_notified(&mut self, active: &mut Active, queue: usize) -> Result<(), HandlerError>;

    /// The descriptor at `index` of [`QueueHandler::watched`] became ready.
    fn fd_ready(&mut self, active: &mut Active, index: usize) -> Result<(), HandlerError>;

    /// After which time [`QueueHandler::tick`] is due; `None` for never.
    fn tick_after(&self) -> Option<Duration> {
        None
    }

    /// The time of [`QueueHandler::tick_after`] has passed.
    fn tick(&mut self, _active: &mut Active) -> Result<(), HandlerError> {
        Ok(())
    }

    /// Waits until no I/O is in flight and all results are in guest memory. No I/O may be in flight
    /// after an error either.
    fn quiesce(&mut self, active: &mut Active) -> Result<(), HandlerError>;

    /// Whether every write that was submitted to the host's storage has succeeded.
    fn writer_state(&self) -> WriterState {
        WriterState::Clean
    }

    /// Drops incomplete requests and all that the driver negotiated. Called after
    /// [`QueueHandler::quiesce`].
    fn reset(&mut self);

    /// The saved state of the handler beyond the queues. Called after [`QueueHandler::quiesce`].
    fn save(&self) -> Value;

    /// Loads a saved state. The queues are as they were saved; no request may complete before
    /// [`QueueHandler::start`].
    fn restore(&mut self, active: Option<&mut Active>, state: &Value) -> Result<(), String>;
}

impl HandlerError {
    /// Adds the queue index to a queue error.
    pub(crate) fn for_queue(queue: usize) -> impl Fn(QueueError) -> Self {
        move |source| Self::Queue { queue, source }
    }
}
