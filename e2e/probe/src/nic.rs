//! The NIC: virtio-net as a smoltcp device. Polled; no call blocks.

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use virtio_drivers::device::net::VirtIONetRaw;

use crate::arena;
use crate::hal::Identity;
use crate::pci::QueueTransport;

type Raw = VirtIONetRaw<Identity, QueueTransport, QUEUE_SIZE>;

/// A virtio NIC with its packet buffers.
pub(crate) struct Nic {
    sender: Sender,
    /// Receive buffers by queue token.
    receiving: [Option<&'static mut [u8]>; QUEUE_SIZE],
    /// The packet that the stack is looking at, so that its buffer goes back at once.
    packet: &'static mut [u8],
}

/// The half of the NIC that a transmit token needs.
struct Sender {
    raw: Raw,
    free: [Option<&'static mut [u8]>; BUFFERS],
    sending: [Option<&'static mut [u8]>; QUEUE_SIZE],
}

impl Nic {
    /// Initializes the device.
    pub(crate) fn new(transport: QueueTransport) -> Option<Self> {
        let mut raw = Raw::new(transport).ok()?;
        raw.disable_interrupts();
        let mut receiving = [const { None }; QUEUE_SIZE];
        for _ in 0..BUFFERS {
            let buffer = arena::bytes(BUFFER_BYTES);
            // SAFETY: the buffer is never freed and is not touched until its token completes.
            let token = unsafe { raw.receive_begin(buffer) }.ok()?;
            receiving[usize::from(token)] = Some(buffer);
        }
        let free = core::array::from_fn(|_| Some(arena::bytes(BUFFER_BYTES)));
        let sender = Sender {
            raw,
            free,
            sending: [const { None }; QUEUE_SIZE],
        };
        Some(Self {
            sender,
            receiving,
            packet: arena::bytes(BUFFER_BYTES),
        })
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        self.sender.raw.mac_address()
    }

    /// Copies the next received packet to `self.packet`, gives the buffer back to the device and
    /// returns the packet's length in bytes.
    fn take_packet(&mut self) -> Option<usize> {
        let token = self.sender.raw.poll_receive()?;
        let buffer = self.receiving[usize::from(token)].take()?;
        // SAFETY: this is the buffer that was submitted under this token.
        let received = unsafe { self.sender.raw.receive_complete(token, buffer) };
        let length = received.map_or(0, |(header, length)| {
            let length = length.min(BUFFER_BYTES - header);
            self.packet[..length].copy_from_slice(&buffer[header..header + length]);
            length
        });
        // SAFETY: as in `new`.
        if let Ok(token) = unsafe { self.sender.raw.receive_begin(buffer) } {
            self.receiving[usize::from(token)] = Some(buffer);
        }
        Some(length)
    }
}

impl Device for Nic {
    type RxToken<'a> = Packet<'a>;
    type TxToken<'a> = Slot<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Packet<'_>, Slot<'_>)> {
        if !self.sender.has_room() {
            return None;
        }
        let length = self.take_packet()?;
        Some((Packet(&self.packet[..length]), Slot(&mut self.sender)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Slot<'_>> {
        self.sender.has_room().then_some(Slot(&mut self.sender))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}

pub(crate) struct Packet<'a>(&'a [u8]);

impl RxToken for Packet<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one packet to send.
pub(crate) struct Slot<'a>(&'a mut Sender);

impl TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let taken = self.0.free.iter_mut().find_map(Option::take);
        let Some(buffer) = taken else {
            unreachable!("a slot is handed out with a buffer free")
        };
        buffer[..HEADER_BYTES].fill(0);
        let result = f(&mut buffer[HEADER_BYTES..HEADER_BYTES + length]);
        self.0.send(buffer, HEADER_BYTES + length);
        result
    }
}

impl Sender {
    /// Collects what was sent and says whether a buffer is free.
    fn has_room(&mut self) -> bool {
        while let Some(token) = self.raw.poll_transmit() {
            let Some(buffer) = self.sending[usize::from(token)].take() else {
                break;
            };
            // SAFETY: this is the buffer that was submitted under this token. Only the address of
            // the buffer matters to the queue, which it uses to give descriptors back.
            let done = unsafe { self.raw.transmit_complete(token, buffer) };
            assert!(done.is_ok(), "the NIC completed what was not sent");
            self.put_back(buffer);
        }
        self.free.iter().any(Option::is_some)
    }

    fn send(&mut self, buffer: &'static mut [u8], length: usize) {
        // SAFETY: the buffer is never freed and is not touched until its token completes.
        match unsafe { self.raw.transmit_begin(&buffer[..length]) } {
            Ok(token) => self.sending[usize::from(token)] = Some(buffer),
            Err(_) => self.put_back(buffer),
        }
    }

    fn put_back(&mut self, buffer: &'static mut [u8]) {
        if let Some(place) = self.free.iter_mut().find(|place| place.is_none()) {
            *place = Some(buffer);
        }
    }
}

const QUEUE_SIZE: usize = 64;
const BUFFERS: usize = 32;
const BUFFER_BYTES: usize = 2048;
/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER_BYTES: usize = 12;
const FRAME_BYTES_MAX: usize = 1514;
