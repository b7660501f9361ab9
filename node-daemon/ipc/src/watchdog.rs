//! `watchdog.sock`: what `bascule-volume` asks of the node's `bascule-watchdog`.

use std::path::PathBuf;

use bascule_types::VolumeId;
use serde::{Deserialize, Serialize};

use crate::volume::WatchdogKind;

/// A request to `bascule-watchdog`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Which watchdog there is.
    Status,
    /// This volume has an open writer: pet only while the lease in its gate page is valid.
    /// Idempotent; outlives the connection.
    Enlist {
        /// The volume.
        volume: VolumeId,
        /// The file of its gate page.
        gate_page: PathBuf,
    },
    /// The volume's gates are closed and every submitted write has completed: its lease may lapse
    /// without a reset.
    Withdraw {
        /// The volume.
        volume: VolumeId,
    },
    /// Disarm the device and end: no volume is enlisted, and Bascule leaves this node. Refused
    /// while one is.
    Disarm,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// To every granted request: which watchdog there is.
    Status {
        /// Its kind.
        kind: WatchdogKind,
        /// After how long without a pet it resets the machine, in milliseconds. Whether that is
        /// short enough for a volume: `bascule_volume_protocol::watchdog_policy::timeout_fits`.
        timeout_ms: u64,
        /// The volumes that are enlisted.
        enlisted: Vec<VolumeId>,
    },
    /// Refused, and why.
    Refused {
        /// The reason.
        reason: String,
    },
}
