//! Completes requests for random bytes.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::Value;

use super::metrics::RngMetrics;
use super::state::RngState;
use crate::virtio::QueueError;
use crate::virtio::queue_handler::{Active, HandlerError, QueueHandler};

#[derive(Debug)]
pub(super) struct RngHandler {
    metrics: Arc<RngMetrics>,
    /// The queue may hold more available chains: the last batch ended at its limit.
    backlog: bool,
}

impl RngHandler {
    pub(super) fn new(metrics: Arc<RngMetrics>) -> Self {
        Self {
            metrics,
            backlog: false,
        }
    }
}

impl QueueHandler for RngHandler {
    fn watched(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn start(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.queue_notified(active, 0)
    }

    fn queue_notified(&mut self, active: &mut Active, queue: usize) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(queue);
        let Some(Some(requests)) = active.queues.get_mut(queue) else {
            return Ok(());
        };
        for _ in 0..BATCH_MAX {
            if let Some(chain) = requests.pop(&active.ram).map_err(&failed)? {
                let length = chain.writable.length_bytes().min(REQUEST_BYTES_MAX);
                if length == 0 {
                    return Err(failed(QueueError::Request("nothing to write to")));
                }
                let bytes = random_bytes(length).map_err(|source| HandlerError::Host {
                    what: "read random bytes",
                    source,
                })?;
                let written = chain.writable.write(&active.ram, &bytes);
                requests
                    .push_used(&active.ram, chain.head, written)
                    .map_err(&failed)?;
                self.metrics.completed(written);
                continue;
            }
            if requests.wants_interrupt(&active.ram).map_err(&failed)? {
                active.shared.signal_queue(queue);
            }
            if !requests.enable_notification(&active.ram).map_err(&failed)? {
                return Ok(());
            }
        }
        self.backlog = true;
        Ok(())
    }

    fn tick_after(&self) -> Option<Duration> {
        self.backlog.then_some(Duration::ZERO)
    }

    fn tick(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.backlog = false;
        self.queue_notified(active, 0)
    }

    fn fd_ready(&mut self, _active: &mut Active, _index: usize) -> Result<(), HandlerError> {
        Ok(())
    }

    fn quiesce(&mut self, _active: &mut Active) -> Result<(), HandlerError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.backlog = false;
    }

    fn save(&self) -> Value {
        RngState {}.to_value()
    }

    fn restore(&mut self, _active: Option<&mut Active>, state: &Value) -> Result<(), String> {
        RngState::from_value(state).map(drop)
    }
}

fn random_bytes(length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

/// Requests completed before the thread handles other events.
const BATCH_MAX: usize = 256;
/// A device may fill a buffer in part (5.4.6); this bounds the work for one request.
const REQUEST_BYTES_MAX: usize = 64 << 10;
