//! The bytes of the gate page, version 1.
//!
//! # Constraints
//! - 4096 bytes, mapped `MAP_SHARED` by processes of one host. Every field is a naturally aligned
//!   64-bit word (`volume` and `boot_id` are two words each) in the host's byte order, accessed by
//!   sequentially consistent atomic loads and stores only.
//! - One writer at a time: the process that holds `flock(LOCK_EX)` on the file.
//! - The writer may die between any two stores. It then leaves a page on which
//!   [`crate::GateReader::check`] still gives the right answer, or a closed one.
//! - Times are `CLOCK_BOOTTIME` nanoseconds of the boot that `boot_id` names.
//!
//! # Writer and readers
//! `bascule-volume` writes the page of its volume. The processes that write to the volume
//! (`bascule-vm`, importers) read it before each write; `bascule-watchdog` reads it before it pets
//! the watchdog. The page outlives every process; a reboot invalidates it.
//!
//! # Byte table
//!
//! | offset | bytes | field | written | meaning |
//! |---|---|---|---|---|
//! | 0 | 8 | `magic` | at creation, last | `BSCLGATE`; 0 means "not ready" |
//! | 8 | 8 | `version` | at creation | the layout's version: 1 |
//! | 16 | 8 | `version_reader_min` | at creation | the lowest reader version that may use this page: 1 |
//! | 24 | 16 | `volume` | at creation | volume id |
//! | 40 | 16 | `boot_id` | at creation | `/proc/sys/kernel/random/boot_id` |
//! | 56 | 8 | | | zero |
//! | 64 | 8 | `owner` | at a new generation | generation << 16 \| slot; generation 0: no lease yet |
//! | 72 | 8 | `expiry` | at each renewal | the lease is valid at `now` iff `now < expiry`; 0 is closed |
//! | 80 | 8 | `failed` | at a failed metadata write | not 0: closed until the volume is re-opened and re-verified |
//! | 88 | 8 | `sequence_sent` | before each heartbeat | the highest heartbeat sequence number ever submitted |
//! | 96 | 4000 | | | zero |
//!
//! # Why no reader combines two leases
//! A renewal stores `expiry` alone: one word. A new generation is published as `expiry := 0`,
//! `owner := new`, `expiry := e`, and generations only rise. A reader loads `owner`, `expiry`, `owner`
//! and requires both loads of `owner` to show its own generation. A generation never returns, so the
//! page showed the reader's generation throughout; the `expiry` in between was stored after that
//! generation was published and before the next one, and belongs to it, or is 0. `failed` is loaded
//! last.

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
/// Offset of `owner`.
pub(crate) const OWNER: usize = 64;
/// Offset of `expiry`.
pub(crate) const EXPIRY: usize = 72;
/// Offset of `failed`.
pub(crate) const FAILED: usize = 80;
/// Offset of `sequence_sent`.
pub(crate) const SEQUENCE_SENT: usize = 88;

/// `BSCLGATE`, as the bytes lie in the page.
pub(crate) const MAGIC_VALUE: u64 = u64::from_le_bytes(*b"BSCLGATE");
/// The version of this layout, and the highest that this release reads.
pub const LAYOUT_VERSION: u64 = 1;
/// The page's size in bytes.
pub const PAGE_BYTES: usize = 4096;
