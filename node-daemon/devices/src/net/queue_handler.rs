//! Moves frames between the queues and the tap, and serves the control queue.

use std::io;
use std::mem::offset_of;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
    virtio_net_hdr_v1,
};

use super::config::{
    CONTROL, F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, F_MRG_RXBUF, MacAddress,
    NetConfig, RX, STATUS_ANNOUNCE, STATUS_AT, STATUS_LINK_UP, TX, set_mtu, set_status,
};
use super::learned::{Learned, Sender};
use super::metrics::NetMetrics;
use super::state::NetState;
use super::tap::{HEADER_BYTES, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, Tap};
use crate::guest_ram::GuestRam;
use crate::virtio::constants::to_u8;
use crate::virtio::queue_handler::{Active, HandlerError, QueueHandler};
use crate::virtio::shared::Shared;
use crate::virtio::{Chain, QueueError, Virtqueue};

#[derive(Debug)]
pub(super) struct NetHandler {
    mac: MacAddress,
    /// The MTU in bytes that was offered to the guest.
    mtu: Option<u16>,
    refuses_larger_mtu: bool,
    tap: Arc<dyn Tap>,
    learned: Arc<Learned>,
    shared: Arc<Shared>,
    metrics: Arc<NetMetrics>,
    /// Buffer for a received frame, with its virtio-net header.
    frame: Vec<u8>,
    /// Length of the frame in `frame` that waits for buffers of the guest, if one does.
    held_bytes: Option<usize>,
    /// The tap was full at the last attempt to send.
    send_blocked: bool,
    /// The tap may hold more frames: the last batch ended at its limit.
    receive_backlog: bool,
    /// The TX queue may hold more frames: the last batch ended at its limit.
    send_backlog: bool,
    /// The log has it that the tap refuses offloads: a guest can try again without an end.
    told_segmented: bool,
}

/// The result of delivering a received frame.
enum Delivery {
    Done,
    /// The guest has too few buffers at the moment.
    NoBuffers,
    /// The frame is larger than the buffers of the guest.
    Dropped,
}

impl NetHandler {
    pub(super) fn new(
        config: &NetConfig,
        tap: Arc<dyn Tap>,
        learned: Arc<Learned>,
        shared: Arc<Shared>,
        metrics: Arc<NetMetrics>,
    ) -> Self {
        Self {
            mac: config.mac,
            mtu: config.mtu,
            refuses_larger_mtu: config.refuses_larger_mtu,
            tap,
            learned,
            shared,
            metrics,
            frame: vec![0; FRAME_BYTES_MAX],
            held_bytes: None,
            send_blocked: false,
            receive_backlog: false,
            send_backlog: false,
            told_segmented: false,
        }
    }

    /// Delivers received frames while the guest has buffers.
    fn receive(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(RX);
        let merge = active.features & F_MRG_RXBUF != 0;
        let Some(Some(queue)) = active.queues.get_mut(RX) else {
            return Ok(());
        };
        let ram = &active.ram;
        self.receive_backlog = false;
        queue.disable_notification(ram).map_err(&failed)?;
        let mut count = 0;
        while let Some(length) = self.next_frame() {
            match deliver(queue, ram, &mut self.frame[..length], merge).map_err(&failed)? {
                Delivery::Done => self.metrics.received(length - HEADER_BYTES),
                Delivery::Dropped => self.metrics.receive_dropped(),
                Delivery::NoBuffers => {
                    self.held_bytes = Some(length);
                    // The driver does not notify buffers that it added before this.
                    if queue.enable_notification(ram).map_err(&failed)? && count < BATCH_MAX {
                        count += 1;
                        continue;
                    }
                    break;
                }
            }
            count += 1;
            if count >= BATCH_MAX {
                self.receive_backlog = true;
                break;
            }
        }
        if count > 0 && queue.wants_interrupt(ram).map_err(&failed)? {
            self.shared.signal_queue(RX);
        }
        Ok(())
    }

    /// The length of the frame in `self.frame`: the held one, or the tap's next.
    fn next_frame(&mut self) -> Option<usize> {
        if let Some(length) = self.held_bytes.take() {
            return Some(length);
        }
        loop {
            match self.tap.receive(&mut self.frame) {
                Ok(length) if length > HEADER_BYTES => {
                    self.observe_received(length);
                    return Some(length);
                }
                Ok(_) => self.metrics.receive_dropped(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        // The tap is down; it becomes readable when it is up again.
                        tracing::debug!(device = %self.shared, %error, "cannot read from the tap");
                    }
                    return None;
                }
            }
        }
    }

    /// The network may say that an address of the guest is elsewhere now.
    fn observe_received(&self, length: usize) {
        let frame = self.frame.get(HEADER_BYTES..length).unwrap_or_default();
        self.learned.observe(self.mac, Sender::Network, frame);
    }

    /// Sends the frames that the guest has queued.
    fn send(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(TX);
        let Some(Some(queue)) = active.queues.get_mut(TX) else {
            return Ok(());
        };
        let ram = &active.ram;
        self.send_blocked = false;
        let mut used = false;
        self.send_backlog = true;
        for _ in 0..BATCH_MAX {
            queue.disable_notification(ram).map_err(&failed)?;
            let Some(chain) = queue.pop(ram).map_err(&failed)? else {
                if queue.enable_notification(ram).map_err(&failed)? {
                    continue;
                }
                self.send_backlog = false;
                break;
            };
            if !self.send_frame(ram, &chain) {
                queue.undo_pop();
                self.send_blocked = true;
                self.send_backlog = false;
                break;
            }
            queue.push_used(ram, chain.head, 0).map_err(&failed)?;
            used = true;
        }
        if used && queue.wants_interrupt(ram).map_err(&failed)? {
            self.shared.signal_queue(TX);
        }
        Ok(())
    }

    /// Returns `false` when the tap is full and the frame must be sent later.
    fn send_frame(&self, ram: &GuestRam, chain: &Chain) -> bool {
        let length = chain.readable.length_bytes();
        if length <= HEADER_BYTES || length > FRAME_BYTES_MAX {
            self.metrics.send_dropped();
            return true;
        }
        let mut frame = vec![0; length];
        chain.readable.read(ram, &mut frame);
        match self.tap.send(&frame) {
            Ok(()) => {
                let sent = &frame[HEADER_BYTES..];
                self.learned.observe(self.mac, Sender::Guest, sent);
                self.metrics.sent(length - HEADER_BYTES);
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                tracing::debug!(device = %self.shared, %error, "the tap refused a frame; it is dropped");
                self.metrics.send_dropped();
                true
            }
        }
    }

    /// Serves the control queue (5.1.6.5). The only supported command is
    /// `VIRTIO_NET_CTRL_ANNOUNCE_ACK`.
    fn control(&self, active: &mut Active) -> Result<(), HandlerError> {
        let failed = HandlerError::for_queue(CONTROL);
        let Some(Some(queue)) = active.queues.get_mut(CONTROL) else {
            return Ok(());
        };
        let ram = &active.ram;
        let mut used = false;
        loop {
            while let Some(mut chain) = queue.pop(ram).map_err(&failed)? {
                let ack = chain.writable.take_back(1);
                let ack = ack.ok_or_else(|| failed(QueueError::Request("no room for a status")))?;
                let mut command = [0xFF; 2];
                chain.readable.read(ram, &mut command);
                let answer = if command == ANNOUNCE_ACK {
                    self.shared
                        .change_config(|space| set_status(space, STATUS_ANNOUNCE, false));
                    CONTROL_OK
                } else {
                    CONTROL_ERROR
                };
                ack.write(ram, &[answer]);
                queue.push_used(ram, chain.head, 1).map_err(&failed)?;
                used = true;
            }
            if !queue.enable_notification(ram).map_err(&failed)? {
                break;
            }
        }
        if used && queue.wants_interrupt(ram).map_err(&failed)? {
            self.shared.signal_queue(CONTROL);
        }
        Ok(())
    }

    /// Drops the frames that are queued in the tap. They were flooded to all ports while the guest ran
    /// on the source, which received them too; here they would delay new frames. What they say of the
    /// guest's addresses counts: the last of them came after the source had stopped to listen.
    fn drop_stale_frames(&mut self) {
        self.held_bytes = None;
        for _ in 0..STALE_FRAMES_MAX {
            match self.tap.receive(&mut self.frame) {
                Ok(length) => self.observe_received(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Sets the tap's offloads to those that the guest has negotiated.
    fn set_offloads(&mut self, features: u64) {
        if let Err(error) = self.tap.set_offloads(offloads(features)) {
            // The kernel then segments frames, which every guest can receive.
            if !std::mem::replace(&mut self.told_segmented, true) {
                tracing::warn!(device = %self.shared, %error, "cannot set offloads of the tap; frames arrive segmented");
            }
        }
    }
}

impl QueueHandler for NetHandler {
    fn watched(&self) -> Vec<RawFd> {
        vec![self.tap.raw_fd()]
    }

    fn start(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.set_offloads(active.features);
        self.control(active)?;
        self.send(active)?;
        self.receive(active)
    }

    fn queue_notified(&mut self, active: &mut Active, queue: usize) -> Result<(), HandlerError> {
        match queue {
            RX => self.receive(active),
            TX => self.send(active),
            _ => self.control(active),
        }
    }

    fn fd_ready(&mut self, active: &mut Active, _index: usize) -> Result<(), HandlerError> {
        if self.send_blocked {
            self.send(active)?;
        }
        self.receive(active)
    }

    fn tick_after(&self) -> Option<Duration> {
        if self.receive_backlog || self.send_backlog {
            Some(Duration::ZERO)
        } else {
            self.send_blocked.then_some(SEND_RETRY)
        }
    }

    fn tick(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        self.send(active)?;
        self.receive(active)
    }

    fn quiesce(&mut self, _active: &mut Active) -> Result<(), HandlerError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.held_bytes = None;
        self.send_blocked = false;
        self.receive_backlog = false;
        self.send_backlog = false;
        // A guest that begins anew claims its addresses again, or others.
        self.learned.restore(&[]);
        self.shared
            .change_config(|space| set_status(space, STATUS_ANNOUNCE, false));
    }

    fn save(&self) -> Value {
        let mut status = [0; 2];
        self.shared.config_read(STATUS_AT as u64, &mut status);
        NetState {
            mac: self.mac,
            status: u16::from_le_bytes(status),
            mtu: self.mtu,
            addresses: Vec::new(),
            learned: self.learned.save(),
        }
        .to_value()
    }

    fn restore(&mut self, _active: Option<&mut Active>, state: &Value) -> Result<(), String> {
        let state = NetState::from_value(state)?;
        if state.mac != self.mac {
            return Err(format!(
                "the source has the address {}, this device {}",
                state.mac, self.mac
            ));
        }
        if let (Some(offered), Some(here)) = (state.mtu, self.mtu)
            && offered > here
        {
            let what =
                format!("the guest uses an MTU of {offered} bytes, the network here has {here}");
            if self.refuses_larger_mtu {
                return Err(what);
            }
            tracing::warn!(device = %self.shared, "{what}: its longest packets are lost");
        }
        self.mtu = state.mtu;
        self.shared.change_config(|space| {
            set_mtu(space, state.mtu.unwrap_or(0));
            for bit in [STATUS_LINK_UP, STATUS_ANNOUNCE] {
                set_status(space, bit, state.status & bit != 0);
            }
        });
        self.learned.restore(&state.learned);
        self.drop_stale_frames();
        Ok(())
    }
}

/// The `TUN_F_` flags for the features of a guest. A driver that violates 5.1.3.1, by segmentation without
/// checksums or congestion notification without segmentation, gets frames without: a tap has no such offloads.
pub(super) fn offloads(features: u64) -> u32 {
    let has = |feature| features & feature != 0;
    let segments = [(F_GUEST_TSO4, TUN_F_TSO4), (F_GUEST_TSO6, TUN_F_TSO6)];
    let segments = segments.iter().filter(|(feature, _)| has(*feature));
    let segments = segments.fold(0, |flags, (_, flag)| flags | flag);
    if !has(F_GUEST_CSUM) {
        return 0;
    }
    match segments {
        0 => TUN_F_CSUM,
        _ if has(F_GUEST_ECN) => TUN_F_CSUM | segments | TUN_F_TSO_ECN,
        _ => TUN_F_CSUM | segments,
    }
}

/// Writes a frame to one buffer of the guest, or to several if `VIRTIO_NET_F_MRG_RXBUF` was negotiated
/// (5.1.6.4), and sets `num_buffers`.
fn deliver(
    queue: &mut Virtqueue,
    ram: &GuestRam,
    frame: &mut [u8],
    merge: bool,
) -> Result<Delivery, QueueError> {
    let chains_max = if merge { MERGED_MAX } else { 1 };
    let mut chains: Vec<Chain> = Vec::new();
    let mut room = 0;
    let mut exhausted = false;
    while room < frame.len() && chains.len() < chains_max && !exhausted {
        match queue.pop(ram)? {
            Some(chain) => {
                room += chain.writable.length_bytes();
                chains.push(chain);
            }
            None => exhausted = true,
        }
    }
    if room < frame.len() {
        for _ in &chains {
            queue.undo_pop();
        }
        return Ok(if exhausted {
            Delivery::NoBuffers
        } else {
            Delivery::Dropped
        });
    }
    let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    frame[BUFFER_COUNT_AT..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
    let mut done = 0;
    let mut used = Vec::with_capacity(chains.len());
    for chain in chains {
        let written = chain.writable.write(ram, &frame[done..]);
        used.push((chain.head, written));
        done += written;
    }
    queue.push_used_together(ram, &used)?;
    Ok(Delivery::Done)
}

/// The largest frame: a merged TCP segment with Ethernet, VLAN and virtio-net header.
const FRAME_BYTES_MAX: usize = 65535 + 18 + HEADER_BYTES;
/// Frames moved before the thread handles other events.
const BATCH_MAX: usize = 256;
/// Buffers that one frame may fill: the largest frame needs 44 buffers of 1514 bytes.
const MERGED_MAX: usize = 64;
/// More than a tap queues by default (1000 frames); bounds the loop on a busy network.
const STALE_FRAMES_MAX: usize = 4096;
/// Retry interval for a full tap, in case it does not signal that it became writable.
const SEND_RETRY: Duration = Duration::from_millis(5);
/// The last field of the virtio-net header.
const BUFFER_COUNT_AT: usize = offset_of!(virtio_net_hdr_v1, num_buffers);
/// Class and command of the control queue's request.
const ANNOUNCE_ACK: [u8; 2] = [
    to_u8(VIRTIO_NET_CTRL_ANNOUNCE),
    to_u8(VIRTIO_NET_CTRL_ANNOUNCE_ACK),
];
const CONTROL_OK: u8 = to_u8(VIRTIO_NET_OK);
const CONTROL_ERROR: u8 = to_u8(VIRTIO_NET_ERR);
