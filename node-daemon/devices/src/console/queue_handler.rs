//! Moves bytes between the port's queues and the host, and serves the control queues.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::config::{
    CONTROL_FROM_GUEST, CONTROL_TO_GUEST, F_MULTIPORT, FROM_GUEST, PORT, TO_GUEST,
};
use super::port::HostPort;
use super::state::{ConsoleState, DEVICE_READY, PORT_OPEN, PORT_READY, REPLIES_MAX, Reply};
use crate::guest_ram::GuestRam;
use crate::virtio::queue_handler::{Active, HandlerError, QueueHandler};
use crate::virtio::shared::Shared;
use crate::virtio::{Chain, QueueError};

pub(super) struct ConsoleHandler {
    port: Arc<dyn HostPort>,
    shared: Arc<Shared>,
    state: ConsoleState,
    /// Bytes for the guest that wait for its buffers.
    held: Vec<u8>,
    /// A queue may hold more work: the last batch ended at its limit.
    backlog: bool,
}

impl ConsoleHandler {
    pub(super) fn new(name: String, port: Arc<dyn HostPort>, shared: Arc<Shared>) -> Self {
        Self {
            port,
            shared,
            state: ConsoleState::new(name),
            held: Vec::new(),
            backlog: false,
        }
    }

    fn all(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.backlog = false;
        self.control(active)?;
        self.take_output(active)?;
        self.give_input(active)
    }

    /// Serves both control queues: a request is taken while its replies have room.
    fn control(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        if active.features & F_MULTIPORT == 0 {
            return Ok(());
        }
        for _ in 0..BATCH_MAX {
            self.send_replies(active)?;
            if self.state.replies.len() + REPLIES_OF_ONE > REPLIES_MAX
                || !self.take_request(active)?
            {
                return Ok(());
            }
        }
        self.backlog = true;
        Ok(())
    }

    /// Takes one control message of the guest. False when there is none.
    fn take_request(&mut self, active: &mut Active) -> Result<bool, HandlerError> {
        let failed = HandlerError::for_queue(CONTROL_FROM_GUEST);
        let Some(Some(queue)) = active.queues.get_mut(CONTROL_FROM_GUEST) else {
            return Ok(false);
        };
        let ram = &active.ram;
        let Some(chain) = queue.pop(ram).map_err(&failed)? else {
            return queue.enable_notification(ram).map_err(&failed);
        };
        let mut message = [0; CONTROL_BYTES];
        let whole = chain.readable.read(ram, &mut message) == CONTROL_BYTES;
        queue.push_used(ram, chain.head, 0).map_err(&failed)?;
        if queue.wants_interrupt(ram).map_err(&failed)? {
            self.shared.signal_queue(CONTROL_FROM_GUEST);
        }
        if whole {
            self.obey(message);
        }
        Ok(true)
    }

    /// A control message of the guest (5.3.6.2). One that this device has no use for is ignored.
    fn obey(&mut self, message: [u8; CONTROL_BYTES]) {
        let [a, b, c, d, e, f, g, h] = message;
        let port = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        match (event, port) {
            (DEVICE_READY, _) if value == 1 => self.state.replies.push_back(Reply::Add),
            (PORT_READY, PORT) if value == 1 => {
                let replies = [Reply::Name, Reply::Open];
                self.state.replies.extend(replies);
            }
            (PORT_OPEN, PORT) => self.set_open(value == 1),
            _ => {}
        }
    }

    fn set_open(&mut self, open: bool) {
        self.state.guest_open = open;
        self.port.guest_opened(open);
    }

    fn send_replies(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(CONTROL_TO_GUEST);
        let Some(Some(queue)) = active.queues.get_mut(CONTROL_TO_GUEST) else {
            return Ok(());
        };
        let ram = &active.ram;
        let mut used = false;
        while let Some(reply) = self.state.replies.front() {
            let Some(chain) = queue.pop(ram).map_err(&failed)? else {
                if queue.enable_notification(ram).map_err(&failed)? {
                    continue;
                }
                break;
            };
            let written = chain.writable.write(ram, &reply.bytes(&self.state.port));
            queue.push_used(ram, chain.head, written).map_err(&failed)?;
            self.state.replies.pop_front();
            used = true;
        }
        if used && queue.wants_interrupt(ram).map_err(&failed)? {
            self.shared.signal_queue(CONTROL_TO_GUEST);
        }
        Ok(())
    }

    /// Passes the guest's output to the host, as much as that takes.
    fn take_output(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(FROM_GUEST);
        let Some(Some(queue)) = active.queues.get_mut(FROM_GUEST) else {
            return Ok(());
        };
        let ram = &active.ram;
        let mut used = false;
        let mut more = true;
        for _ in 0..BATCH_MAX {
            let Some(chain) = queue.pop(ram).map_err(&failed)? else {
                if queue.enable_notification(ram).map_err(&failed)? {
                    continue;
                }
                more = false;
                break;
            };
            match take_chunk(&*self.port, ram, &chain, &mut self.state.taken_bytes) {
                Taken::All => {
                    queue.push_used(ram, chain.head, 0).map_err(&failed)?;
                    used = true;
                }
                Taken::Part => queue.undo_pop(),
                Taken::Nothing => {
                    queue.undo_pop();
                    more = false;
                    break;
                }
            }
        }
        self.backlog |= more;
        if used && queue.wants_interrupt(ram).map_err(&failed)? {
            self.shared.signal_queue(FROM_GUEST);
        }
        Ok(())
    }

    /// Passes the host's output to the guest. What comes while no program in the guest has the port open is dropped:
    /// nobody reads it.
    fn give_input(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(TO_GUEST);
        let Some(Some(queue)) = active.queues.get_mut(TO_GUEST) else {
            return Ok(());
        };
        let ram = &active.ram;
        let mut used = false;
        let mut more = true;
        for _ in 0..BATCH_MAX {
            if self.held.is_empty() && !hold_input(&*self.port, &mut self.held) {
                more = false;
                break;
            }
            if !self.state.guest_open {
                self.held.clear();
                continue;
            }
            let Some(chain) = queue.pop(ram).map_err(&failed)? else {
                if queue.enable_notification(ram).map_err(&failed)? {
                    continue;
                }
                more = false;
                break;
            };
            let written = chain.writable.write(ram, &self.held);
            if written == 0 {
                return Err(failed(QueueError::Request("nothing to write to")));
            }
            queue.push_used(ram, chain.head, written).map_err(&failed)?;
            self.held.drain(..written);
            used = true;
        }
        self.backlog |= more;
        if used && queue.wants_interrupt(ram).map_err(&failed)? {
            self.shared.signal_queue(TO_GUEST);
        }
        Ok(())
    }
}

impl QueueHandler for ConsoleHandler {
    fn watched(&self) -> Vec<RawFd> {
        vec![self.port.raw_fd()]
    }

    fn start(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.port.guest_opened(self.state.guest_open);
        self.all(active)
    }

    fn queue_notified(&mut self, active: &mut Active, _queue: usize) -> Result<(), HandlerError> {
        self.all(active)
    }

    fn fd_ready(&mut self, active: &mut Active, _index: usize) -> Result<(), HandlerError> {
        self.all(active)
    }

    fn tick_after(&self) -> Option<Duration> {
        self.backlog.then_some(Duration::ZERO)
    }

    fn tick(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.all(active)
    }

    fn quiesce(&mut self, _active: &mut Active) -> Result<(), HandlerError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.state = ConsoleState::new(std::mem::take(&mut self.state.port));
        self.held.clear();
        self.backlog = false;
        self.port.guest_opened(false);
    }

    fn save(&self) -> Value {
        self.state.to_value()
    }

    fn restore(&mut self, _active: Option<&mut Active>, state: &Value) -> Result<(), String> {
        self.state = ConsoleState::from_value(state, &self.state.port)?;
        Ok(())
    }
}

/// How much of a chain the host has taken.
enum Taken {
    All,
    /// Some more, and it may take the rest at once.
    Part,
    Nothing,
}

/// Passes the next bytes of `chain` to the host: those behind the first `taken`, which is kept up to date.
fn take_chunk(port: &dyn HostPort, ram: &GuestRam, chain: &Chain, taken: &mut usize) -> Taken {
    let mut rest = chain.readable.clone();
    // A state may claim that more was taken than there is.
    let left = match rest.take_front(*taken) {
        Some(_) => rest.length_bytes(),
        None => 0,
    };
    let mut data = [0; HELD_BYTES_MAX];
    let data = &mut data[..left.min(HELD_BYTES_MAX)];
    rest.read(ram, data);
    let sent = if data.is_empty() {
        0
    } else {
        match port.send(data) {
            Ok(sent) => sent.min(data.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Taken::Nothing,
            Err(_) => left,
        }
    };
    if sent == left {
        *taken = 0;
        return Taken::All;
    }
    *taken += sent;
    Taken::Part
}

/// Reads the host's next bytes into `held`. False when there are none now.
fn hold_input(port: &dyn HostPort, held: &mut Vec<u8>) -> bool {
    let mut data = [0; HELD_BYTES_MAX];
    // Without an input, or with a broken one, there is nothing to pass on.
    let count = port.receive(&mut data).unwrap_or(0);
    held.extend(data.iter().take(count));
    !held.is_empty()
}

/// Bytes that pass between a queue and the host at a time, in either direction.
pub(super) const HELD_BYTES_MAX: usize = 4096;
/// Steps of each direction before the thread handles other events.
const BATCH_MAX: usize = 64;
/// The fixed part of a control message: port, event, value.
const CONTROL_BYTES: usize = 8;
/// Most replies to one control message.
const REPLIES_OF_ONE: usize = 2;
