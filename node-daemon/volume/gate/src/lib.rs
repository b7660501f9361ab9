//! The I/O gate: a shared-memory page with the expiry of a node's lease, and the check that each
//! write passes right before submission (sanlock and VMFS check a lease in the same way).
//!
//! There is one page per attached volume: a file in the host's run directory (a tmpfs).
//! `bascule-volume` is its only writer and holds an exclusive lock on it as long as it runs. Every
//! process that writes to the volume maps the page read-only, and so does `bascule-watchdog`. The
//! page outlives `bascule-volume`: its next process takes the page over, and open gates stay open.
//!
//! This crate must not know the on-disk format, nor when a lease may be extended: that is in
//! `bascule-volume-protocol`. Read next: [`layout`] (the bytes), [`GateWriter`],
//! [`GateReader`]. Beside it, in [`writer_page`]: a page for each process that writes, in which it says
//! whether writes of it are under way. [`Pace`] says how large a write may be that no guest waits for.
//!
//! ```no_run
//! # use bascule_types::{Owner, SlotId, Generation};
//! # use bascule_volume_gate::{GateReader, boot_time_now};
//! # let mine = Owner { slot: SlotId(3), generation: Generation(7) };
//! let gate = GateReader::open("/run/bascule/volumes/gold/gate")?;
//! if gate.check(boot_time_now(), mine).is_ok() {
//!     // Submit the write now.
//! }
//! # Ok::<(), bascule_volume_gate::GateError>(())
//! ```

mod clock;
mod error;
pub mod layout;
mod pace;
mod page;
mod reader;
mod writer;
pub mod writer_page;

pub use clock::{Changes, Clock, LinuxClock, boot_id, boot_time_now};
pub use error::GateError;
pub use pace::Pace;
pub use reader::{GateClosed, GateClosedReason, GateReader, GateView};
pub use writer::{GateTakenOver, GateWriter};
pub use writer_page::{WriterPage, WriterView};
