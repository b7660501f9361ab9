//! The bytes of the gate page, version 1.
//!
//! # Constraints
//! - 4096 bytes, mapped `MAP_SHARED` by processes of one host. Every field is a naturally aligned
//!   64-bit word in the host's byte order, read and written by atomic instructions only.
//! - One writer at a time, which holds `flock(LOCK_EX)` on the file.
//! - A writer may die between any two stores. Whatever it leaves is either a page on which
//!   [`crate::GateReader::check`] gives the right answer, or one that is closed.
//! - Times are `CLOCK_BOOTTIME` nanoseconds; `boot_id` says of which boot.
//!
//! # Byte table
//!
//! | offset | bytes | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | `magic` | `BSCLGATE`; stored last by the creator, so that 0 means "not ready" |
//! | 8 | 8 | `version` | the layout that the writer speaks: 1 |
//! | 16 | 8 | `version_reader_min` | the lowest version that may read this page: 1 |
//! | 24 | 16 | `volume` | volume id |
//! | 40 | 16 | `boot_id` | `/proc/sys/kernel/random/boot_id` at creation |
//! | 64 | 8 | `tenure` | generation << 16 \| slot; 0 while nobody holds the slot |
//! | 72 | 8 | `expiry` | the lease is valid at `now` iff `now < expiry`; 0 is closed |
//! | 80 | 8 | `failed` | not 0: sticky-failed until re-opened and re-verified |
//! | 88 | 8 | `sequence_sent` | the highest heartbeat sequence number ever submitted |
//! | 96 | 4000 | | zero |
//!
//! # Why no reader sees a torn lease
//! A renewal changes `expiry` alone: one word. A new tenure is published as
//! `expiry := 0`, `tenure := new`, `expiry := e`, and tenures only rise. A reader loads `tenure`,
//! `expiry`, `tenure` and demands that both loads show its own. As tenures never come back, the
//! page showed its own throughout, so the `expiry` in between was stored after that tenure and
//! before the next one: it is its own, or 0. All accesses are sequentially consistent.
//! `failed` is loaded last of all.

/// Offset of `magic`.
pub(crate) const MAGIC: usize = 0;
/// Offset of `version`.
pub(crate) const VERSION: usize = 8;
/// Offset of `version_reader_min`.
pub(crate) const VERSION_READER_MIN: usize = 16;
/// Offset of `volume`.
pub(crate) const VOLUME: usize = 24;
/// Offset of `boot_id`.
pub(crate) const BOOT_ID: usize = 40;
/// Offset of `tenure`.
pub(crate) const OWNER: usize = 64;
/// Offset of `expiry`.
pub(crate) const EXPIRY: usize = 72;
/// Offset of `failed`.
pub(crate) const FAILED: usize = 80;
/// Offset of `sequence_sent`.
pub(crate) const SEQUENCE_SENT: usize = 88;

/// `BSCLGATE`, as the bytes lie in the page.
pub(crate) const MAGIC_VALUE: u64 = u64::from_le_bytes(*b"BSCLGATE");
/// The version of this layout.
pub const LAYOUT_VERSION: u64 = 1;
/// The page's size.
pub const PAGE_BYTES: usize = 4096;
