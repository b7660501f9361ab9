//! The parameters of a block device, and its device-specific configuration (virtio 1.2, 5.2.4).

use std::mem::offset_of;

use sha2::{Digest, Sha256};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES, virtio_blk_config,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::virtio::constants::{feature, to_u16};

/// The parameters of a block device.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// Unique in the virtual machine, such as `blk0`; used in logs, metrics and saved states.
    pub name: String,
    /// The serial number that the guest reads.
    pub serial: Serial,
    /// Number of request queues, 1 to 16; one per vCPU avoids contention in the guest.
    pub queue_count: u16,
    /// Offers `VIRTIO_BLK_F_RO` and fails writes.
    pub read_only: bool,
}

/// A disk's serial number: the guest's `/dev/disk/by-id/virtio-…` link. 20 bytes, zeroes at the end
/// (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Serial([u8; SERIAL_BYTES]);

impl Serial {
    /// The serial number of a disk of this name: the name itself where it fits, so that users
    /// recognize it. Of a longer one it is the beginning, a dash, and 8 hex digits of the whole name's
    /// SHA-256: names that differ anywhere have other serial numbers, wherever the disk is used.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        let mut bytes = [0; SERIAL_BYTES];
        let mut put_all = |text: &[u8]| {
            for (byte, own) in bytes.iter_mut().zip(text) {
                *byte = *own;
            }
        };
        if name.len() <= SERIAL_BYTES {
            put_all(name.as_bytes());
        } else {
            let digest = Sha256::digest(name);
            let hex: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
            let kept = name.floor_char_boundary(SERIAL_BYTES - 1 - hex.len());
            put_all(format!("{}-{hex}", &name[..kept]).as_bytes());
        }
        Self(bytes)
    }

    /// The data of a `VIRTIO_BLK_T_GET_ID` request (5.2.6).
    pub(super) const fn bytes(self) -> [u8; SERIAL_BYTES] {
        self.0
    }
}

/// The configuration structure up to `num_queues`.
pub(super) fn config_space(size_bytes: u64, block_bytes: u32, queue_count: u16) -> Vec<u8> {
    let mut space = vec![0; CONFIG_BYTES];
    put(&mut space, 0, &(size_bytes / SECTOR_BYTES).to_le_bytes());
    put(&mut space, SEGMENTS_MAX_AT, &SEGMENTS_MAX.to_le_bytes());
    set_block_bytes(&mut space, block_bytes);
    put(&mut space, QUEUE_COUNT_AT, &queue_count.to_le_bytes());
    space
}

/// Sets the `blk_size` field.
pub(super) fn set_block_bytes(space: &mut [u8], block_bytes: u32) {
    put(space, BLOCK_BYTES_AT, &block_bytes.to_le_bytes());
}

fn put(space: &mut [u8], at: usize, bytes: &[u8]) {
    space[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The virtio device type (5).
pub(super) const DEVICE_TYPE: u16 = to_u16(VIRTIO_ID_BLOCK);
/// PCI class: mass storage, other.
pub(super) const CLASS: [u8; 3] = [0x01, 0x80, 0];
/// Descriptors of a queue; with indirect tables a request takes one.
pub(super) const QUEUE_SIZE: u16 = 256;
pub(super) const QUEUES_MAX: u16 = 16;
pub(super) const SECTOR_BYTES: u64 = 512;
pub(super) const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
pub(super) const F_SEG_MAX: u64 = feature(VIRTIO_BLK_F_SEG_MAX);
pub(super) const F_RO: u64 = feature(VIRTIO_BLK_F_RO);
pub(super) const F_BLK_SIZE: u64 = feature(VIRTIO_BLK_F_BLK_SIZE);
pub(super) const F_FLUSH: u64 = feature(VIRTIO_BLK_F_FLUSH);
pub(super) const F_MQ: u64 = feature(VIRTIO_BLK_F_MQ);
/// Data segments of a request: with header and status they fit a queue without indirect tables.
const SEGMENTS_MAX: u32 = 254;
const SEGMENTS_MAX_AT: usize = offset_of!(virtio_blk_config, seg_max);
const BLOCK_BYTES_AT: usize = offset_of!(virtio_blk_config, blk_size);
const QUEUE_COUNT_AT: usize = offset_of!(virtio_blk_config, num_queues);
/// The structure up to and including `num_queues`.
const CONFIG_BYTES: usize = QUEUE_COUNT_AT + size_of::<u16>();

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_name_that_fits_is_the_serial_number_itself() {
        assert_eq!(Serial::of_name("root").bytes()[..5], *b"root\0");
        let longest = "twenty-bytes-of-name";
        assert_eq!(Serial::of_name(longest).bytes(), longest.as_bytes());
    }

    /// The two had one serial number, and the guest one by-id link for both.
    #[test]
    fn names_that_differ_only_after_twenty_bytes_have_serial_numbers_of_their_own() {
        let names = ["customer-database-wal-1", "customer-database-wal-2"];
        let serials = names.map(|name| Serial::of_name(name).bytes());
        assert_eq!(serials[0], *b"customer-da-4c7cd099");
        assert_ne!(serials[0], serials[1]);
        let many: Vec<String> = (0..1000)
            .map(|n| format!("{}{n}", "x".repeat(40)))
            .collect();
        let serials: BTreeSet<_> = many
            .iter()
            .map(|name| Serial::of_name(name).bytes())
            .collect();
        assert_eq!(serials.len(), many.len());
    }

    #[test]
    fn a_name_is_never_cut_within_a_character() {
        let serial = Serial::of_name(&"ü".repeat(20)).bytes();
        assert!(std::str::from_utf8(&serial).is_ok());
    }
}
