//! The list of all targets.

use crate::{devices, documents, image, ipc, migration, peers, requests, vm, volume};

/// A named function that takes any bytes, and panics when an oracle does not hold.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Target {
    /// Also the name of its program in `targets/` and of its folder in `corpus/`.
    pub name: &'static str,
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    target("migration_stream", migration::stream),
    target("volume_record", volume::record),
    target("volume_metadata", volume::metadata),
    target("ipc_frame", ipc::frame),
    target("image_inspection", image::inspection),
    target("image_decompression", image::decompression),
    target("image_qcow2", image::qcow2),
    target("documents", documents::documents),
    target("block_queues", devices::block_queues),
    target("network_queues", devices::network_queues),
    target("entropy_queues", devices::entropy_queues),
    target("console_queues", devices::console_queues),
    target("pci_bus", devices::pci_bus),
    target("device_state", devices::state),
    target("machine_state", vm::state),
    target("kernel_loaders", vm::kernels),
    target("agent_answers", vm::agent),
    target("cloud_init_disk", vm::cloud_init),
    target("volume_requests", requests::requests),
    target("volume_peers", peers::frame),
];

impl Target {
    /// The target with this name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let found = TARGETS.iter().find(|target| target.name == name);
        *found.unwrap_or_else(|| panic!("no target is named {name}"))
    }
}

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}
