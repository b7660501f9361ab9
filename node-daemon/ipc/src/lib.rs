//! The local protocols between the processes of one node, over unix stream sockets.
//!
//! # Constraints
//! - A running `bascule-vm` lives for months: every release talks to the previous two. Messages are
//!   JSON, so that a field may be added (with a serde default) without breaking an older reader; the
//!   meaning of a message never changes. [`Hello`] comes first in each direction.
//! - The peer is on the same host and has the same or fewer rights. Lengths are bounded nevertheless
//!   (I7).
//! - A client sends one request and awaits its answer; at most one request is in flight.
//!
//! | socket | server | clients | messages |
//! |---|---|---|---|
//! | `vms/<uid>/vm.sock` | `bascule-vm` | `bascule-node` | [`vm`] |
//! | `volumes/<name>/volume.sock` | `bascule-volume` | `bascule-node`, `bascule-vm` | [`volume`] |
//! | `watchdog.sock` | `bascule-watchdog` | `bascule-volume` | [`watchdog`] |
//! | `watchdog-holder.sock` | `bascule-watchdog --hold` | `bascule-watchdog` | [`watchdog`] |
//!
//! # Frame
//! | bytes | meaning |
//! |---|---|
//! | 4 | length of the JSON that follows, little-endian, at most [`FRAME_BYTES_MAX`] |
//! | n | one JSON document |
//!
//! File descriptors travel as `SCM_RIGHTS` with the length word, at most [`FRAME_FDS_MAX`] of them.
//!
//! [`tls`] is the node's certificate, which these processes share as files.
#![forbid(unsafe_code)]

mod accept_errors;
mod frame;
#[cfg(feature = "mutual-tls")]
pub mod mutual_tls;
pub mod tls;
pub mod vm;
pub mod volume;
pub mod watchdog;

pub use accept_errors::AcceptErrors;
pub use frame::{Connection, FRAME_BYTES_MAX, FRAME_FDS_MAX, IpcError, Kind};

use serde::{Deserialize, Serialize};

/// The first message of either side: the protocol versions that it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The highest version that the sender speaks.
    pub version: u32,
    /// The lowest version that the sender still speaks.
    pub version_min: u32,
}

impl Hello {
    /// The versions that this release speaks.
    ///
    /// | version | new |
    /// |---|---|
    /// | 1 | |
    /// | 2 | [`volume::Request::ReportFailure`], [`vm::Request::WaitsFor`] |
    /// | 3 | the writer page, the third descriptor of [`volume::Response::Opened`] |
    /// | 4 | [`vm::Request::Reset`] |
    /// | 5 | [`vm::Request::ConsoleFrom`] |
    /// | 6 | [`volume::Request::Vm`] |
    pub const THIS: Self = Self {
        version: 6,
        version_min: 1,
    };

    /// The version that both sides speak: the lower of the two highest.
    ///
    /// # Errors
    /// [`IpcError::Version`] when there is none.
    pub fn agree(self, peer: Self) -> Result<u32, IpcError> {
        let version = self.version.min(peer.version);
        if version >= self.version_min && version >= peer.version_min {
            Ok(version)
        } else {
            Err(IpcError::Version {
                ours: self,
                theirs: peer,
            })
        }
    }
}
