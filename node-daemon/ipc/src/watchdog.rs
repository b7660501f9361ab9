//! `watchdog.sock`: the requests of `bascule-volume` to the node's `bascule-watchdog`.
//! `watchdog-holder.sock`: those of `bascule-watchdog` to the process that holds its device open too.

use std::path::PathBuf;

use bascule_types::{BootTime, VolumeId};
use serde::{Deserialize, Serialize};

use crate::volume::WatchdogKind;

/// A request to `bascule-watchdog`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Request {
    /// The watchdog's kind, timeout and enlisted volumes.
    Status,
    /// This volume has an open writer: pet the device only while the lease in its gate page is valid.
    /// Idempotent; stays in force after the connection ends.
    Enlist {
        volume: VolumeId,
        /// The file of the volume's gate page.
        gate_page: PathBuf,
        /// Until when the client holds a lease that it publishes in the gate page next: it enlists the
        /// volume before a gate opens, not after. None: the page shows the lease.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_until: Option<BootTime>,
        /// When the client decided to send this: refused if a request for the volume that was decided
        /// later has been carried out. None from an earlier release.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decided_at: Option<BootTime>,
    },
    /// The volume's gates are closed and every submitted write has completed: its lease may lapse
    /// without a reset.
    Withdraw {
        volume: VolumeId,
        /// As in [`Request::Enlist`]: a withdrawal that its client has given up does not undo a later
        /// enlistment.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decided_at: Option<BootTime>,
    },
    /// Disarm the device and end the process, because Bascule is removed from this node. Refused
    /// while a volume is enlisted.
    Disarm,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Response {
    /// The answer to every granted request.
    Status {
        kind: WatchdogKind,
        /// The time without a pet after which the watchdog resets the machine, in milliseconds.
        /// `bascule_volume_protocol::watchdog_policy::timeout_fits` decides whether that is short
        /// enough for a volume.
        timeout_ms: u64,
        /// The volumes that are enlisted.
        enlisted: Vec<VolumeId>,
    },
    /// The request was refused; the reason is for logs.
    Refused { reason: String },
}

/// A request to the holder, which keeps the watchdog device open beside `bascule-watchdog`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HolderRequest {
    /// Hold the device whose descriptor comes with this request. The first request, once.
    Hold,
    /// Send a descriptor of the device.
    Take,
    /// Close the device and end: it is about to be disarmed.
    End,
}

/// The answer to every [`HolderRequest`]; to [`HolderRequest::Take`] with one file descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HolderResponse {
    /// Done.
    Done,
}
