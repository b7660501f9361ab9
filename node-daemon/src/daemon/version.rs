//! The version of the API that a call is made in.

use bascule_node_api::{VERSION, VERSION_MIN, agree};
use tonic::Status;

/// The version that the operator and this node both speak.
pub(super) fn agreed_version(version: u32, version_min: u32) -> Result<u32, Status> {
    agree(version, version_min).ok_or_else(|| {
        Status::failed_precondition(format!(
            "this node speaks API versions {VERSION_MIN} to {VERSION}, the operator {version_min} \
             to {version}: upgrade the older of the two"
        ))
    })
}
