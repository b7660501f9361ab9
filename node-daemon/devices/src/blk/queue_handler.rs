//! Parses descriptor chains into requests on the disk, and completes them in the used ring.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use bascule_types::WriterState;
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::config::{BlkConfig, F_FLUSH, SECTOR_BYTES, SERIAL_BYTES, set_block_bytes};
use super::metrics::{BlkMetrics, RequestKind};
use super::state::{BlkState, Unanswered};
use crate::disk::{Completion, DiskEngine, DiskRequest, Operation};
use crate::failure::DeviceFailure;
use crate::virtio::constants::to_u8;
use crate::virtio::queue_handler::{Active, HandlerError, QueueHandler};
use crate::virtio::shared::Shared;
use crate::virtio::{Chain, QueueError, Segments};

#[derive(Debug)]
pub(super) struct BlkHandler {
    engine: DiskEngine,
    serial: [u8; SERIAL_BYTES],
    read_only: bool,
    block_bytes: u32,
    shared: Arc<Shared>,
    metrics: Arc<BlkMetrics>,
    /// Requests that the disk has not completed, by tag.
    requests: Vec<Option<Request>>,
    free_tags: Vec<usize>,
    /// Queues with used buffers for which no interrupt has been considered yet.
    to_signal: BTreeSet<usize>,
    /// A queue may hold more available chains: the last batch ended at its limit.
    backlog: bool,
}

/// A chain that the disk has not completed.
#[derive(Debug)]
struct Request {
    queue: usize,
    head: u16,
    status: Segments,
    kind: RequestKind,
    data_bytes: usize,
}

/// A descriptor chain, checked and parsed into a block request.
enum ParsedRequest {
    /// A request that the disk performs.
    Disk(Operation, RequestKind),
    /// A request that completes at once: its status, and the bytes of data written to the guest.
    Immediate(u8, usize),
}

impl BlkHandler {
    pub(super) fn new(
        config: &BlkConfig,
        engine: DiskEngine,
        block_bytes: u32,
        shared: Arc<Shared>,
        metrics: Arc<BlkMetrics>,
    ) -> Self {
        Self {
            engine,
            serial: config.serial.bytes(),
            read_only: config.read_only,
            block_bytes,
            shared,
            metrics,
            requests: Vec::new(),
            free_tags: Vec::new(),
            to_signal: BTreeSet::new(),
            backlog: false,
        }
    }

    fn process_queues(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        (0..active.queues.len()).try_for_each(|queue| self.process_queue(active, queue))?;
        self.progress(active)
    }

    /// Processes the chains that the driver has made available, at most [`BATCH_MAX`].
    fn process_queue(&mut self, active: &mut Active, queue: usize) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(queue);
        for _ in 0..BATCH_MAX {
            let Some(Some(own)) = active.queues.get_mut(queue) else {
                return Ok(());
            };
            own.disable_notification(&active.ram).map_err(&failed)?;
            let Some(chain) = own.pop(&active.ram).map_err(&failed)? else {
                if own.enable_notification(&active.ram).map_err(&failed)? {
                    continue;
                }
                return Ok(());
            };
            self.process_chain(active, queue, chain)?;
        }
        self.backlog = true;
        Ok(())
    }

    fn process_chain(
        &mut self,
        active: &mut Active,
        queue: usize,
        mut chain: Chain,
    ) -> Result<(), HandlerError> {
        let malformed = |what| HandlerError::for_queue(queue)(QueueError::Request(what));
        let status = chain
            .writable
            .take_back(1)
            .ok_or_else(|| malformed("no room for a status"))?;
        let header = chain.readable.take_front(HEADER_BYTES);
        let header = header.ok_or_else(|| malformed("shorter than its header"))?;
        let mut bytes = [0; HEADER_BYTES];
        header.read(&active.ram, &mut bytes);
        let head = chain.head;
        match self.parse_request(active, &bytes, chain) {
            ParsedRequest::Immediate(answer, data_bytes) => {
                if answer != STATUS_OK {
                    self.metrics.failed();
                }
                self.answer(active, queue, head, &status, (answer, data_bytes))
            }
            ParsedRequest::Disk(operation, kind) => {
                let data_bytes = match &operation {
                    Operation::Read { data, .. } | Operation::Write { data, .. } => {
                        data.length_bytes()
                    }
                    Operation::Flush => 0,
                };
                let tag = self.track(Request {
                    queue,
                    head,
                    status,
                    kind,
                    data_bytes,
                });
                self.engine.enqueue(DiskRequest { tag, operation });
                Ok(())
            }
        }
    }

    /// Parses the header of a request: type, reserved, sector (5.2.6).
    fn parse_request(
        &self,
        active: &Active,
        header: &[u8; HEADER_BYTES],
        chain: Chain,
    ) -> ParsedRequest {
        let [a, b, c, d, _, _, _, _, sector @ ..] = *header;
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR_BYTES);
        match (u32::from_le_bytes([a, b, c, d]), offset) {
            (VIRTIO_BLK_T_IN, Some(offset)) => {
                let data = chain.writable;
                ParsedRequest::Disk(Operation::Read { offset, data }, RequestKind::Read)
            }
            (VIRTIO_BLK_T_OUT, Some(offset)) if !self.read_only => {
                let operation = Operation::Write {
                    offset,
                    data: chain.readable,
                    // Without VIRTIO_BLK_F_FLUSH the driver assumes a write-through cache (5.2.6.2).
                    durable: active.features & F_FLUSH == 0,
                };
                ParsedRequest::Disk(operation, RequestKind::Write)
            }
            (VIRTIO_BLK_T_FLUSH, _) => ParsedRequest::Disk(Operation::Flush, RequestKind::Flush),
            (VIRTIO_BLK_T_GET_ID, _) => {
                let written = chain.writable.write(&active.ram, &self.serial);
                ParsedRequest::Immediate(STATUS_OK, written)
            }
            (VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT, _) => ParsedRequest::Immediate(STATUS_IO_ERROR, 0),
            _ => ParsedRequest::Immediate(STATUS_UNSUPPORTED, 0),
        }
    }

    fn track(&mut self, request: Request) -> u64 {
        let place = self.free_tags.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[place] = Some(request);
        u64::try_from(place).unwrap_or(u64::MAX)
    }

    /// Submits what the disk can submit, and completes the finished requests.
    fn progress(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        let done = self.engine.progress().map_err(host)?;
        self.complete(active, done)?;
        self.metrics.record(self.engine.stats());
        self.signal(active)
    }

    fn complete(&mut self, active: &mut Active, done: Vec<Completion>) -> Result<(), HandlerError> {
        for Completion { tag, result } in done {
            let place = usize::try_from(tag).unwrap_or(usize::MAX);
            let Some(request) = self.requests.get_mut(place).and_then(Option::take) else {
                continue;
            };
            self.free_tags.push(place);
            let answer = match result {
                Ok(()) => {
                    self.metrics.completed(request.kind, request.data_bytes);
                    let is_read = request.kind == RequestKind::Read;
                    (STATUS_OK, if is_read { request.data_bytes } else { 0 })
                }
                Err(error) => {
                    tracing::debug!(device = %self.shared, %error, "request failed");
                    self.metrics.failed();
                    (STATUS_IO_ERROR, 0)
                }
            };
            self.answer(active, request.queue, request.head, &request.status, answer)?;
        }
        if let Some((operation, reason)) = self.engine.take_failure() {
            self.shared.report(DeviceFailure::DiskFailed {
                device: self.shared.name().to_owned(),
                operation,
                reason,
            });
        }
        if let Some((operation, reason)) = self.engine.take_held() {
            self.shared.report(DeviceFailure::DiskHeld {
                device: self.shared.name().to_owned(),
                operation,
                reason,
            });
        }
        Ok(())
    }

    fn answer(
        &mut self,
        active: &mut Active,
        queue: usize,
        head: u16,
        status: &Segments,
        (answer, data_bytes): (u8, usize),
    ) -> Result<(), HandlerError> {
        status.write(&active.ram, &[answer]);
        if let Some(Some(own)) = active.queues.get_mut(queue) {
            let failed = HandlerError::for_queue(queue);
            own.push_used(&active.ram, head, data_bytes + 1)
                .map_err(failed)?;
            self.to_signal.insert(queue);
        }
        Ok(())
    }

    fn signal(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        for queue in std::mem::take(&mut self.to_signal) {
            if let Some(Some(own)) = active.queues.get_mut(queue) {
                let failed = HandlerError::for_queue(queue);
                if own.wants_interrupt(&active.ram).map_err(failed)? {
                    self.shared.signal_queue(queue);
                }
            }
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.engine.clear();
        self.requests.clear();
        self.free_tags.clear();
        self.to_signal.clear();
        self.backlog = false;
    }
}

impl QueueHandler for BlkHandler {
    fn watched(&self) -> Vec<RawFd> {
        vec![self.engine.completion_fd()]
    }

    fn start(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.engine.retry_held();
        self.process_queues(active)
    }

    fn queue_notified(&mut self, active: &mut Active, queue: usize) -> Result<(), HandlerError> {
        self.process_queue(active, queue)?;
        self.progress(active)
    }

    fn fd_ready(&mut self, active: &mut Active, _index: usize) -> Result<(), HandlerError> {
        self.progress(active)
    }

    fn tick_after(&self) -> Option<Duration> {
        if self.backlog {
            return Some(Duration::ZERO);
        }
        self.engine.retry_after()
    }

    fn tick(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        if std::mem::take(&mut self.backlog) {
            return self.process_queues(active);
        }
        self.progress(active)
    }

    fn quiesce(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        // Record before the wait too: the counters show how many commands it waits for.
        self.metrics.record(self.engine.stats());
        let drained = self.engine.drain();
        self.metrics.record(self.engine.stats());
        self.complete(active, drained.map_err(host)?.completions)?;
        self.signal(active)
    }

    fn writer_state(&self) -> WriterState {
        self.engine.writer_state()
    }

    fn reset(&mut self) {
        self.clear();
        self.metrics.record(self.engine.stats());
    }

    fn save(&self) -> Value {
        let unanswered = self.requests.iter().flatten().map(|request| Unanswered {
            queue: request.queue,
            head: request.head,
        });
        BlkState {
            size_bytes: self.engine.size_bytes(),
            block_bytes: self.block_bytes,
            unanswered: unanswered.collect(),
        }
        .to_value()
    }

    fn restore(&mut self, active: Option<&mut Active>, state: &Value) -> Result<(), String> {
        let state = BlkState::from_value(state)?;
        let size_bytes = self.engine.size_bytes();
        if state.size_bytes != size_bytes {
            return Err(format!(
                "the source has a disk of {} bytes, this device one of {size_bytes}",
                state.size_bytes
            ));
        }
        self.clear();
        self.block_bytes = state.block_bytes;
        self.shared
            .change_config(|space| set_block_bytes(space, state.block_bytes));
        let Some(active) = active else {
            return Ok(());
        };
        for Unanswered { queue, head } in state.unanswered {
            let Some(Some(own)) = active.queues.get_mut(queue) else {
                return Err(format!("a request in queue {queue}, which is not enabled"));
            };
            let chain = own
                .take(&active.ram, head)
                .map_err(|error| error.to_string())?;
            self.process_chain(active, queue, chain)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

fn host(source: io::Error) -> HandlerError {
    HandlerError::Host {
        what: "submit disk commands",
        source,
    }
}

/// Chains popped from a queue before the thread handles other events: a driver that refills a queue
/// as fast as it is processed must not delay a pause.
const BATCH_MAX: usize = 1024;
const HEADER_BYTES: usize = 16;
const STATUS_OK: u8 = to_u8(VIRTIO_BLK_S_OK);
const STATUS_IO_ERROR: u8 = to_u8(VIRTIO_BLK_S_IOERR);
const STATUS_UNSUPPORTED: u8 = to_u8(VIRTIO_BLK_S_UNSUPP);
