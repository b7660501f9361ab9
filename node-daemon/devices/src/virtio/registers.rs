//! The common configuration structure (virtio 1.2, 4.1.4.3): registers without side effects.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use super::constants::{NO_VECTOR, to_u8};
use super::queue::QueueSetup;

/// Registers that the driver writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    pub(crate) device_feature_select: u32,
    pub(crate) driver_feature_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) status: u8,
    pub(crate) queue_select: u16,
    pub(crate) queues: Vec<QueueSetup>,
}

impl Registers {
    pub(crate) fn new(queue_sizes: &[u16]) -> Self {
        let queue = |&size| QueueSetup {
            size,
            vector: NO_VECTOR,
            ..QueueSetup::default()
        };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    /// The queue at index `queue_select`, if it exists.
    pub(crate) fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue, if the driver may still change it: it exists and is not enabled, and
    /// DRIVER_OK is not set (4.1.4.3.2).
    fn changeable(&mut self) -> Option<&mut QueueSetup> {
        let in_use = self.status & STATUS_DRIVER_OK != 0;
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        (!queue.enabled && !in_use).then_some(queue)
    }

    /// Handles a write of `length` bytes to the register at `offset` that configures the selected
    /// queue, whose maximum is in `sizes_max`. Other sizes and offsets are ignored.
    pub(crate) fn write_queue(
        &mut self,
        sizes_max: &[u16],
        offset: u64,
        length: usize,
        value: u32,
    ) {
        let word = u16::try_from(value & 0xFFFF).unwrap_or(0);
        let size_max = sizes_max.get(usize::from(self.queue_select));
        let size_max = size_max.copied().unwrap_or(0);
        let Some(queue) = self.changeable() else {
            return;
        };
        match (offset, length) {
            (0x18, 2) if word.is_power_of_two() && word <= size_max => queue.size = word,
            (0x1C, 2) if word == 1 => queue.enabled = true,
            (0x20 | 0x24, 4) => set_half(&mut queue.descriptors, offset == 0x24, value),
            (0x28 | 0x2C, 4) => set_half(&mut queue.available, offset == 0x2C, value),
            (0x30 | 0x34, 4) => set_half(&mut queue.used, offset == 0x34, value),
            _ => {}
        }
    }

    /// Sets the 32 driver feature bits at `driver_feature_select`, unless FEATURES_OK is set.
    pub(crate) fn set_driver_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let mask = u64::from(u32::MAX) << shift;
        self.driver_features = (self.driver_features & !mask) | (u64::from(value) << shift);
    }
}

/// The 32 feature bits at `select`; 0 for a `select` above 1.
pub(crate) fn feature_word(features: u64, select: u32) -> u32 {
    let half = match select {
        0 => features & u64::from(u32::MAX),
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(half).unwrap_or(0)
}

/// Replaces the high or low 32 bits of an address.
fn set_half(address: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *address = (*address & !(u64::from(u32::MAX) << shift)) | (u64::from(value) << shift);
}

// Device status bits (2.1).
pub(crate) const STATUS_FEATURES_OK: u8 = to_u8(VIRTIO_CONFIG_S_FEATURES_OK);
pub(crate) const STATUS_DRIVER_OK: u8 = to_u8(VIRTIO_CONFIG_S_DRIVER_OK);
pub(crate) const STATUS_NEEDS_RESET: u8 = to_u8(VIRTIO_CONFIG_S_NEEDS_RESET);
