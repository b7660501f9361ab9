//! A virtqueue as a device's thread uses it: pop descriptor chains, push used buffers, suppress
//! notifications. The crate `virtio-queue` implements the rings.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::chain::{Chain, ChainError};
use super::constants::to_u16;
use crate::guest_ram::GuestRam;

/// A virtqueue that the driver has enabled (virtio 2.7, split virtqueues).
#[derive(Debug)]
pub struct Virtqueue {
    queue: Queue,
    /// Chains popped and not yet pushed to the used ring.
    outstanding: u16,
    /// `next_used` at the last call of [`Virtqueue::wants_interrupt`].
    interrupt_checked_at: u16,
}

/// The driver's configuration of a queue and the positions in its rings: the saved state of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// The number of descriptors.
    pub size: u16,
    /// `queue_enable`
    pub enabled: bool,
    /// The MSI-X vector, or 0xFFFF for none.
    pub vector: u16,
    /// The guest address of the descriptor table.
    pub descriptors: u64,
    /// The guest address of the available ring ("driver area").
    pub available: u64,
    /// The guest address of the used ring ("device area").
    pub used: u64,
    /// The index of the next entry of the available ring to pop.
    pub next_available: u16,
    /// The next entry of the used ring to fill.
    pub next_used: u16,
}

/// A rule of virtqueues that the guest violated. The device stops until it is reset.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum QueueError {
    /// Violated by a descriptor chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// Violated by the rings.
    #[error("{0}")]
    Rings(virtio_queue::Error),
    /// The rings are not in guest RAM.
    #[error(
        "rings of {size} entries at {descriptors:#x}, {available:#x}, {used:#x} are not guest memory"
    )]
    RingsNotRam {
        size: u16,
        descriptors: u64,
        available: u64,
        used: u64,
    },
    /// More chains are outstanding than the queue has descriptors: the driver made one available
    /// twice.
    #[error("a chain was made available again before it was used")]
    OfferedTwice,
    /// A chain that is not a valid request for this kind of device.
    #[error("malformed request: {0}")]
    Request(&'static str),
}

impl Virtqueue {
    /// The queue that the driver configured, or `None` if it is not enabled.
    ///
    /// # Errors
    /// [`QueueError`] when the configuration is invalid.
    pub fn new(
        ram: &GuestRam,
        setup: &QueueSetup,
        size_max: u16,
        event_idx: bool,
    ) -> Result<Option<Self>, QueueError> {
        if !setup.enabled {
            return Ok(None);
        }
        let state = QueueState {
            max_size: size_max,
            next_avail: setup.next_available,
            next_used: setup.next_used,
            event_idx_enabled: event_idx,
            size: setup.size,
            ready: true,
            desc_table: setup.descriptors,
            avail_ring: setup.available,
            used_ring: setup.used,
        };
        let queue = Queue::try_from(state).map_err(QueueError::Rings)?;
        if !queue.is_valid(ram) {
            return Err(QueueError::RingsNotRam {
                size: setup.size,
                descriptors: setup.descriptors,
                available: setup.available,
                used: setup.used,
            });
        }
        Ok(Some(Self {
            queue,
            outstanding: 0,
            interrupt_checked_at: setup.next_used,
        }))
    }

    /// Pops the next available chain, if there is one.
    ///
    /// # Errors
    /// [`QueueError`]: the queue is unusable until the device is reset.
    pub fn pop(&mut self, ram: &GuestRam) -> Result<Option<Chain>, QueueError> {
        let mut available = self.queue.iter(ram).map_err(QueueError::Rings)?;
        let Some(head) = available.next().map(|chain| chain.head_index()) else {
            return Ok(None);
        };
        self.take(ram, head).map(Some)
    }

    /// Reads the chain at `head` again, which was outstanding when the queue was saved.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn take(&mut self, ram: &GuestRam, head: u16) -> Result<Chain, QueueError> {
        if self.outstanding >= self.queue.size() {
            return Err(QueueError::OfferedTwice);
        }
        let table = GuestAddress(self.queue.desc_table());
        let chain = Chain::read(ram, table, self.queue.size(), head)?;
        self.outstanding += 1;
        Ok(chain)
    }

    /// Makes the next [`Virtqueue::pop`] return the last popped chain again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
        self.outstanding -= 1;
    }

    /// Pushes a chain to the used ring, with the number of bytes that the device wrote to it.
    ///
    /// # Errors
    /// [`QueueError`] when the used ring cannot be written.
    pub fn push_used(
        &mut self,
        ram: &GuestRam,
        head: u16,
        length_bytes: usize,
    ) -> Result<(), QueueError> {
        let length = u32::try_from(length_bytes).unwrap_or(u32::MAX);
        self.queue
            .add_used(ram, head, length)
            .map_err(QueueError::Rings)?;
        self.outstanding = self.outstanding.saturating_sub(1);
        Ok(())
    }

    /// Pushes several chains with one update of the used index: the driver sees all of them or none,
    /// as it must when one frame fills them (virtio 1.2, 5.1.6.4).
    ///
    /// # Errors
    /// [`QueueError`] when the used ring cannot be written.
    pub fn push_used_together(
        &mut self,
        ram: &GuestRam,
        chains: &[(u16, usize)],
    ) -> Result<(), QueueError> {
        let Some((&(last, last_bytes), others)) = chains.split_last() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for &(head, length_bytes) in others {
            let slot = u64::from(next % self.queue.size());
            let entry = GuestAddress(self.queue.used_ring() + USED_HEADER_BYTES + 8 * slot);
            let length = u32::try_from(length_bytes).unwrap_or(u32::MAX);
            let [a, b] = u16::to_le_bytes(head);
            let [c, d, e, f] = u32::to_le_bytes(length);
            ram.write_slice(&[a, b, 0, 0, c, d, e, f], entry)
                .map_err(rings)?;
            next = next.wrapping_add(1);
            self.outstanding = self.outstanding.saturating_sub(1);
        }
        self.queue.set_next_used(next);
        self.push_used(ram, last, last_bytes)
    }

    /// Whether the driver wants an interrupt for the chains pushed since the last call (2.7.7,
    /// 2.7.10).
    ///
    /// # Errors
    /// [`QueueError`] when the rings cannot be read.
    pub fn wants_interrupt(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        // The used index must be visible before `used_event` or the flags are read.
        std::sync::atomic::fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let old = std::mem::replace(&mut self.interrupt_checked_at, self.queue.next_used());
        if self.queue.event_idx_enabled() {
            let at = ring + AVAILABLE_HEADER_BYTES + 2 * u64::from(self.queue.size());
            let used_event = ram
                .load::<u16>(GuestAddress(at), Ordering::Relaxed)
                .map_err(rings)?;
            let new = self.interrupt_checked_at;
            let since_event = new.wrapping_sub(u16::from_le(used_event)).wrapping_sub(1);
            return Ok(since_event < new.wrapping_sub(old));
        }
        let flags = ram
            .load::<u16>(GuestAddress(ring), Ordering::Relaxed)
            .map_err(rings)?;
        Ok(u16::from_le(flags) & AVAILABLE_NO_INTERRUPT == 0)
    }

    /// Enables notifications from the driver. Returns `true` when chains became available in the
    /// meantime: the driver may not have notified them, so the caller must pop them now.
    ///
    /// # Errors
    /// [`QueueError`] when the rings cannot be accessed.
    pub fn enable_notification(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(ram)
            .map_err(QueueError::Rings)
    }

    /// Suppresses notifications from the driver while the device processes the queue.
    ///
    /// # Errors
    /// [`QueueError`] when the rings cannot be written.
    pub fn disable_notification(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        self.queue
            .disable_notification(ram)
            .map_err(QueueError::Rings)
    }

    /// The next available and the next used index.
    #[must_use]
    pub fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }
}

fn rings(error: GuestMemoryError) -> QueueError {
    QueueError::Rings(virtio_queue::Error::GuestMemory(error))
}

const AVAILABLE_HEADER_BYTES: u64 = 4;
const USED_HEADER_BYTES: u64 = 4;
const AVAILABLE_NO_INTERRUPT: u16 = to_u16(VRING_AVAIL_F_NO_INTERRUPT);
