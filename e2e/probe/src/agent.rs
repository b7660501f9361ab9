//! A small agent behind the port of a virtio-console device (virtio 1.2, 5.3): it answers what `qemu-ga` is asked for its
//! host's status. Polled; no call blocks.

use core::fmt::{self, Write};

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::arena;
use crate::hal::Identity;
use crate::pci::QueueTransport;
use crate::serial::{Console, Text};

/// The agent with its device.
pub(crate) struct Agent {
    transport: QueueTransport,
    control_in: Pipe,
    control_out: Pipe,
    input: Pipe,
    output: Pipe,
    /// Control messages to send, as event and value, the next one first.
    requests: [Option<(u16, u16)>; 2],
    line: Text<LINE_BYTES_MAX>,
    mac: [u8; 6],
    address: [u8; 4],
}

/// One queue with one buffer.
struct Pipe {
    queue: VirtQueue<Identity, QUEUE_SIZE>,
    index: u16,
    buffer: &'static mut [u8],
    token: Option<u16>,
}

impl Agent {
    /// Initializes the device, and tells it that its ports are wanted.
    pub(crate) fn new(
        mut transport: QueueTransport,
        (mac, address): ([u8; 6], [u8; 4]),
    ) -> Option<Self> {
        let driver = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(DeviceStatus::empty());
        transport.set_status(driver);
        let features = transport.read_device_features() & (F_VERSION_1 | F_MULTIPORT);
        transport.write_driver_features(features);
        transport.set_status(driver | DeviceStatus::FEATURES_OK);
        let mut pipe = |index| {
            Some(Pipe {
                queue: VirtQueue::new(&mut transport, index, false, false).ok()?,
                index,
                buffer: arena::bytes(BUFFER_BYTES),
                token: None,
            })
        };
        let (control_in, control_out) = (pipe(2)?, pipe(3)?);
        let (input, output) = (pipe(4)?, pipe(5)?);
        transport.set_status(driver | DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK);
        (features == F_VERSION_1 | F_MULTIPORT).then_some(Self {
            transport,
            control_in,
            control_out,
            input,
            output,
            requests: [Some((DEVICE_READY, 1)), None],
            line: Text::new(),
            mac,
            address,
        })
    }

    /// Answers what has come. True when the guest is to switch itself off.
    pub(crate) fn poll(&mut self, console: Console) -> bool {
        self.control();
        // The answer to one request is gone before the next is read.
        if !self.output.is_free() {
            return false;
        }
        let Some(length) = self.input.received(&mut self.transport) else {
            return false;
        };
        for index in 0..length {
            let byte = self.input.buffer[index];
            if byte == DELIMITER {
                self.line = Text::new();
            } else if byte == b'\n' {
                let line = core::mem::replace(&mut self.line, Text::new());
                if self.answer(line.as_str(), console).is_none() {
                    return true;
                }
            } else {
                self.line.push(byte);
            }
        }
        false
    }

    fn control(&mut self) {
        if let Some(length) = self.control_in.received(&mut self.transport)
            && length >= CONTROL_BYTES
        {
            let event = u16::from_le_bytes([self.control_in.buffer[4], self.control_in.buffer[5]]);
            match event {
                PORT_ADD => self.requests = [Some((PORT_READY, 1)), None],
                PORT_OPEN => self.requests = [Some((PORT_OPEN, 1)), None],
                _ => {}
            }
        }
        if self.control_out.is_free()
            && let Some((event, value)) = self.requests[0].take()
        {
            self.requests.swap(0, 1);
            let mut message = [0; CONTROL_BYTES];
            message[..4].copy_from_slice(&PORT.to_le_bytes());
            message[4..6].copy_from_slice(&event.to_le_bytes());
            message[6..].copy_from_slice(&value.to_le_bytes());
            self.control_out.send(&message, &mut self.transport);
        }
    }

    /// Answers one request. None for the request to shut down.
    fn answer(&mut self, line: &str, console: Console) -> Option<()> {
        let mut said = Text::<BUFFER_BYTES>::new();
        let is = |command: &str| line.contains(command);
        let written = if is("guest-sync-delimited") {
            said.push(DELIMITER);
            write!(said, "{{\"return\": {}}}", number_behind(line, "\"id\":"))
        } else if is("guest-info") {
            said.write_str("{\"return\": {\"version\": \"7.7\"}}")
        } else if is("guest-get-osinfo") {
            said.write_str("{\"return\": {\"id\": \"probe\", \"kernel-release\": \"0.1\"}}")
        } else if is("guest-get-host-name") {
            said.write_str("{\"return\": {\"host-name\": \"probe\"}}")
        } else if is("guest-network-get-interfaces") {
            self.interfaces(&mut said)
        } else if is("guest-set-time") {
            let time = number_behind(line, "\"time\":");
            console.line(format_args!("agent set-time {time}"));
            said.write_str("{\"return\": {}}")
        } else if is("guest-shutdown") {
            console.line(format_args!("agent shutdown"));
            return None;
        } else {
            said.write_str("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"\"}}")
        };
        if written.and_then(|()| said.write_str("\n")).is_err() {
            console.line(format_args!("bad: an answer of the agent does not fit"));
        }
        // One that was asked again before it could answer says nothing.
        if self.output.is_free() {
            self.output.send(said.as_bytes(), &mut self.transport);
        }
        Some(())
    }

    fn interfaces(&self, said: &mut Text<BUFFER_BYTES>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.mac;
        let [i, j, k, l] = self.address;
        write!(
            said,
            "{{\"return\": [{{\"hardware-address\": \"{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}\", \
             \"ip-addresses\": [{{\"ip-address\": \"{i}.{j}.{k}.{l}\"}}]}}]}}"
        )
    }
}

impl Pipe {
    /// The length of what the device has written to the buffer since the last call, if it has. Offers the buffer again
    /// with the next call: until then it can be read.
    fn received(&mut self, transport: &mut QueueTransport) -> Option<usize> {
        let Some(token) = self.token else {
            // SAFETY: the buffer is never freed and is not touched until its token completes.
            let added = unsafe { self.queue.add(&[], &mut [&mut *self.buffer]) };
            self.token = added.ok();
            transport.notify(self.index);
            return None;
        };
        if !self.queue.can_pop() {
            return None;
        }
        self.token = None;
        // SAFETY: this is the buffer that was submitted under this token.
        let length = unsafe { self.queue.pop_used(token, &[], &mut [&mut *self.buffer]) };
        length.ok().map(|length| length as usize)
    }

    /// Whether the device has taken what was sent.
    fn is_free(&mut self) -> bool {
        if let Some(token) = self.token
            && self.queue.can_pop()
        {
            self.token = None;
            // SAFETY: this is the buffer that was submitted under this token. Only its address matters to the queue,
            // which it uses to give descriptors back.
            let done = unsafe { self.queue.pop_used(token, &[&*self.buffer], &mut []) };
            assert!(done.is_ok(), "the port completed what was not sent");
        }
        self.token.is_none()
    }

    /// Sends `data`, which fits into the buffer of a free pipe.
    fn send(&mut self, data: &[u8], transport: &mut QueueTransport) {
        self.buffer[..data.len()].copy_from_slice(data);
        // SAFETY: as in `received`.
        let added = unsafe { self.queue.add(&[&self.buffer[..data.len()]], &mut []) };
        self.token = added.ok();
        transport.notify(self.index);
    }
}

/// The digits behind `key`, 0 without any.
fn number_behind(line: &str, key: &str) -> u64 {
    let digits = line.split_once(key).map_or("", |(_, rest)| rest);
    let end = digits
        .find(|byte: char| !byte.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().unwrap_or(0)
}

const QUEUE_SIZE: usize = 4;
const BUFFER_BYTES: usize = 512;
const LINE_BYTES_MAX: usize = 256;
const CONTROL_BYTES: usize = 8;
const F_MULTIPORT: u64 = 1 << 1;
const F_VERSION_1: u64 = 1 << 32;
/// The port of the agent.
const PORT: u32 = 1;
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
/// Precedes a synchronization, and its answer.
const DELIMITER: u8 = 0xFF;
