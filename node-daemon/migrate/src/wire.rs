//! The migration stream's bytes, version 1.
//!
//! # Constraints
//! - Everything is little-endian. Reserved bytes are written as zero and must read as zero.
//! - A frame's body is bounded by its type ([`FrameKind::body_bytes_max`]); a longer one is
//!   refused before any of it is read, and no allocation ever follows from a length that the peer
//!   gave: a [`FrameBuffer`] grows with the bytes that have arrived, and is bounded.
//! - The header and the first 104 bytes of `Hello` are frozen: every version of Bascule can read
//!   them, so that two that share no version can still say so to each other.
//! - Each stream counts its frames from 0; a gap ends the attempt. `RoundEnd` names the count that
//!   each stream had reached, so that a round can be spread over many streams.
//!
//! # Header, 16 bytes
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 2 | magic, `BA 5C` |
//! | 2 | 1 | kind |
//! | 3 | 1 | reserved |
//! | 4 | 2 | stream, 0 to 63 |
//! | 6 | 2 | reserved |
//! | 8 | 4 | length of the body in bytes |
//! | 12 | 4 | the frame's number on its stream and in its direction, from 0, wrapping |
//!
//! # Bodies
//!
//! S→D: sent by the source. D→S: sent by the destination.
//!
//! | kind | name | direction | body (offset: bytes what) | at most |
//! |---|---|---|---|---|
//! | 1 | Hello | S→D | 0: 8 `BASCMIG\0` · 8: 2 lowest version · 10: 2 highest version · 12: 2 streams wanted · 14: 2 reserved · 16: 8 features offered · 24: 8 features required · 32: 16 VM UID · 48: 16 attempt id · 64: 8 epoch · 72: 2 source's slot · 74: 6 reserved · 80: 8 source's generation · 88: 16 volume id · 104: later versions' fields, ignored | 512 |
//! | 2 | Welcome | D→S | 0: 2 version · 2: 2 streams · 4: 4 reserved · 8: 8 features taken · 16: 2 slot · 18: 6 reserved · 24: 8 generation · 32: 8 estimated restore time in ns | 40 |
//! | 3 | Config | S→D | 0: 2 vCPUs · 2: 2 regions · 4: 4 state format version · 8: 4 length of the description · 12: 4 reserved · 16: regions × (8 first page, 8 pages) · then the description · with feature 1: interfaces × 2 MTU in bytes offered to the guest, 0 for none | 65,936 |
//! | 4 | Memory | S→D | 0: 4 runs · 4: 4 reserved · 8: runs × (8 first page, 4 pages, 4 kind: 0 zero, 1 data) · then the contents of the data runs in order | 1,114,120 |
//! | 5 | RoundEnd | S→D | 0: 4 round · 4: 4 streams · 8: streams × (2 stream, 2 reserved, 4 frames sent before this one) | 520 |
//! | 6 | State | S→D | a piece of the device state | 1 MiB |
//! | 7 | StateEnd | S→D | 0: 8 length of the state · 8: 4 CRC32C over it · 12: 4 reserved | 16 |
//! | 8 | Ready | D→S | 0: 8 restore time in ns | 8 |
//! | 9 | Committed | S→D | 0: 8 epoch · 8: 2 slot · 10: 6 reserved · 16: 8 generation | 24 |
//! | 10 | Running | D→S | 0: 8 time from Committed to the first guest instruction in ns | 8 |
//! | 11 | Abort | both | 0: 2 reason · 2: UTF-8 text | 514 |
//! | 12 | Ping | both | 0: 8 token | 8 |
//! | 13 | Pong | both | 0: 8 the same token | 8 |
//! | 14 | RoundAck | D→S | 0: 4 round · 4: 4 reserved | 8 |
//! | 15 | Progress | S→D | 0: 4 round · 4: 4 reserved · 8: 8 bytes sent · 16: 8 bytes remaining | 24 |
//! | 16 | Resident | D→S | with feature bit 1, after the RoundAck of round 1: 0: 8 time that it took to make the memory resident, in ns | 8 |
//!
//! # Versions
//! - 1: the first.
//!
//! # Features
//!
//! | bit | name | what |
//! |---|---|---|
//! | 0 | OFFERED_MTUS | `Config` ends with the MTUs that were offered to the guest, so that a destination whose network has a smaller one refuses before memory is copied |
//! | 1 | RESIDENT | the destination's memory becomes resident while round 1 is copied, not before `RoundAck` 0; the source begins no round 2, and does not stop the guest, before `Resident` |

mod cursor;
mod error;
mod frame;
mod kind;
mod limits;
mod memory;
mod message;
mod stream;

#[cfg(test)]
mod tests;

pub use error::WireError;
pub use frame::{HEADER_BYTES, Header};
pub use kind::FrameKind;
pub use limits::{
    ABORT_TEXT_BYTES_MAX, DESCRIPTION_BYTES_MAX, INTERFACES_MAX, MEMORY_DATA_BYTES_MAX,
    MEMORY_RUNS_MAX, STATE_BYTES_MAX, STATE_PIECE_BYTES_MAX, STREAMS_MAX, VERSION_MAX, VERSION_MIN,
};
pub use memory::{Batch, BatchBuilder, PAGE, RunContents, Runs};
pub use message::{
    Abort, AbortReason, Committed, Config, Features, Frame, Hello, Progress, RoundEnd, StateEnd,
    StreamId, StreamMark, Welcome,
};
pub use stream::{FrameBuffer, FrameWriter};
