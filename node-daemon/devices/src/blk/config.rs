//! How a block device is set up, and its configuration space (5.2.4).

/// A block device.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// Its name, unique in the machine, such as `blk0`.
    pub name: String,
    /// What the guest reads as its serial number: at most 20 bytes, the rest is cut off.
    pub serial: String,
    /// How many request queues, 1 to 16: one per vCPU is good.
    pub queue_count: u16,
    /// Refuses writes.
    pub read_only: bool,
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

/// Changes the block size that the guest is told.
pub(super) fn set_block_bytes(space: &mut [u8], block_bytes: u32) {
    put(space, BLOCK_BYTES_AT, &block_bytes.to_le_bytes());
}

/// The answer to a request for the device's id (5.2.6).
pub(super) fn serial_bytes(serial: &str) -> [u8; SERIAL_BYTES] {
    let mut bytes = [0; SERIAL_BYTES];
    for (byte, own) in bytes.iter_mut().zip(serial.bytes()) {
        *byte = own;
    }
    bytes
}

fn put(space: &mut [u8], at: usize, bytes: &[u8]) {
    space[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The virtio device type (5).
pub(super) const DEVICE_TYPE: u16 = 2;
/// PCI class: mass storage, other.
pub(super) const CLASS: [u8; 3] = [0x01, 0x80, 0];
/// Requests that a queue holds; with indirect tables one descriptor each.
pub(super) const QUEUE_SIZE: u16 = 256;
pub(super) const QUEUES_MAX: u16 = 16;
pub(super) const SECTOR_BYTES: u64 = 512;
pub(super) const SERIAL_BYTES: usize = 20;
/// `VIRTIO_BLK_F_SEG_MAX`
pub(super) const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`
pub(super) const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`
pub(super) const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_MQ`
pub(super) const F_MQ: u64 = 1 << 12;
/// Data segments of a request: with header and status it fits a queue without indirect tables.
const SEGMENTS_MAX: u32 = 254;
const SEGMENTS_MAX_AT: usize = 12;
const BLOCK_BYTES_AT: usize = 20;
const QUEUE_COUNT_AT: usize = 34;
const CONFIG_BYTES: usize = 36;
