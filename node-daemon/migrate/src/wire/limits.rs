//! The bounds of the protocol: versions, streams, lengths.

/// The lowest protocol version that this release speaks.
pub const VERSION_MIN: u16 = 1;
/// The highest protocol version that this release speaks.
pub const VERSION_MAX: u16 = 1;
/// Bound of a machine's device state: 240 vCPUs with 32 KiB each, and devices.
pub const STATE_BYTES_MAX: u64 = 16 << 20;
/// How much of the state one frame carries at most.
pub const STATE_PIECE_BYTES_MAX: usize = 1 << 20;
/// Bound of the machine description in `Config`.
pub const DESCRIPTION_BYTES_MAX: usize = 64 << 10;
/// Bound of the interfaces in `Config`; the API allows 8.
pub const INTERFACES_MAX: usize = 64;
/// Bound of an `Abort`'s text.
pub const ABORT_TEXT_BYTES_MAX: usize = 512;
/// Streams of one attempt.
pub const STREAMS_MAX: u16 = 64;

/// Contents that one frame carries at most: 256 pages. Large enough to make a system call per
/// frame cheap, small enough to bound what both sides hold.
pub const MEMORY_DATA_BYTES_MAX: usize = 1 << 20;
/// Runs that one frame carries at most.
pub const MEMORY_RUNS_MAX: usize = 4096;
/// The size of a run's entry.
pub(super) const RUN_BYTES: usize = 16;
