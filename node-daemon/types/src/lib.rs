//! The types that all of Bascule's crates share: identities, units, ownership, and the requests,
//! rows and refusals of a volume's metadata.
//!
//! The crate has plain values only. It must not know Kubernetes, KVM, sockets or files.
//! Read next: [`Change`] (every request to a volume), `bascule-volume-format` (the bytes of these
//! values on a disk) and `bascule-ipc` (the messages between a node's processes).

mod aligned_buffer;
mod error_chain;
mod http_authorization;
mod id;
mod image_digest;
mod names;
mod on_error;
mod on_panic;
mod ownership;
mod port_range;
mod redacted_url;
mod refusals;
mod requests;
mod rows;
mod secret_key;
mod units;
mod user_range;
mod writer_state;

pub use aligned_buffer::AlignedBuffer;
pub use error_chain::error_chain;
pub use http_authorization::{HttpAuthorization, InvalidAuthorization, SourceAuthorization};
pub use id::{AttemptId, BootId, ClusterId, DiskId, NodeUid, ParseIdError, VmUid, VolumeId};
pub use image_digest::ImageDigest;
pub use names::{NODE_TLS_NAME, OPERATOR_TLS_NAME};
pub use on_error::OnError;
pub use on_panic::OnPanic;
pub use ownership::{Epoch, Generation, Owner, Ownership, SlotId};
pub use port_range::{ParsePortRangeError, PortRange};
pub use redacted_url::RedactedUrl;
pub use refusals::{MissingProof, Refusal, Table};
pub use requests::{Answer, Change};
pub use rows::{
    AdminConfirmation, DiskRole, DiskRow, ExtentRun, FenceProof, FenceRow, RowName, SavedStateRow,
    SavedStateSum, VmRow,
};
pub use secret_key::SecretKey;
pub use units::{BootTime, Bytes, Lba, Sectors, UnitError};
pub use user_range::{ParseUserRangeError, UserRange};
pub use writer_state::WriterState;
