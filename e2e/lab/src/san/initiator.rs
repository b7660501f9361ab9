//! The service of an emulated node that connects it to the SAN: Debian's open-iscsi, `dm-multipath`, `dm-linear`.
//!
//! `dmsetup` and a loop take the place of multipathd, which wants udev: a path that the kernel has failed is reinstated
//! when its session is logged in again, as multipathd does after its path check.

use crate::addresses::Family;

/// The service of a node that connects it to the SAN.
pub(crate) fn service_argv(node: &str) -> Vec<String> {
    let script = include_str!("initiator.sh");
    [
        "sh",
        "-c",
        script,
        SERVICE,
        node,
        &Family::V4.hub().to_string(),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Name of that service, of its log and its virtio port.
pub(crate) const SERVICE: &str = "san";
/// The SAN's disk on every emulated node.
pub const SAN_DEVICE: &str = "/dev/disk/by-id/lab-san";
