//! The gRPC API between operator and nodes.
//!
//! [`proto`] is the envelope (services, versions); [`command`] and [`report`] are its contents.
//! The node executes commands and decides nothing. The volume decides whether a command is safe (by
//! ownership and leases), never the order in which commands arrive.
#![forbid(unsafe_code)]

pub mod cloud_init;
pub mod command;
mod connect;
mod host_port;
pub mod report;

/// The generated gRPC types and services.
#[expect(
    missing_docs,
    unused_qualifications,
    clippy::allow_attributes,
    clippy::too_many_lines,
    reason = "generated code"
)]
pub mod proto {
    tonic::include_proto!("bascule.node.v1");
}

use bascule_types::PortRange;
pub use bascule_types::{NODE_TLS_NAME, OPERATOR_TLS_NAME};
pub use connect::{ConnectError, connect};
pub use host_port::{HostPort, ParseHostPortError};

/// The highest version of this API that this release speaks.
pub const VERSION: u32 = 1;
/// The lowest version of this API that this release still speaks.
pub const VERSION_MIN: u32 = 1;
/// The TCP port of `bascule-node`'s gRPC API.
pub const NODE_PORT: u16 = 7410;
/// The TCP port of the operator's Join service (node enrollment).
pub const JOIN_PORT: u16 = 7409;
/// The TCP port of the operator's /metrics, /healthz and /readyz.
pub const HTTP_PORT: u16 = 7408;
/// The TCP port of the operator's subresources, which the API server connects to.
pub const SUBRESOURCES_PORT: u16 = 7407;
/// The TCP ports of the `bascule-volume` processes, one for each volume that a node attaches.
pub const VOLUME_PORTS: PortRange = PortRange::of(7420, 16);
/// The audience of the service account token that `bascule-node` enrolls with.
pub const TOKEN_AUDIENCE: &str = "bascule.dev";

/// The version that both sides speak: the lower of the two highest, or none.
#[must_use]
pub fn agree(version: u32, version_min: u32) -> Option<u32> {
    let agreed = version.min(VERSION);
    (agreed >= version_min && agreed >= VERSION_MIN).then_some(agreed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_peer_that_still_speaks_ours_is_answered_in_ours() {
        assert_eq!(agree(VERSION + 2, VERSION), Some(VERSION));
        assert_eq!(agree(VERSION + 2, VERSION + 1), None);
    }
}
