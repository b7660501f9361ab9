//! Options of a new lab: tier, number of nodes, shared disk, images, watchdog.

use std::path::PathBuf;

use anyhow::Result;

use crate::addresses::Families;
use crate::names::{LabName, NodeIndex};
use crate::state::Tier;

/// Options of a new lab.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the lab. Labs with different names are independent.
    pub name: LabName,
    /// Kind of its nodes.
    pub tier: Tier,
    /// Of its nodes, pods and Services.
    pub families: Families,
    /// Number of its nodes.
    pub nodes: u8,
    /// Size of the disk that all nodes share (`/dev/disk/by-id/virtio-shared0`), bytes.
    pub shared_disk_bytes: u64,
    /// Image archives that every node imports.
    pub images: Vec<PathBuf>,
    /// Memory of an emulated node, MiB.
    pub node_memory_mib: u32,
    /// The watchdog of an emulated node.
    pub watchdog: Watchdog,
    /// Whether the emulated nodes are connected to a SAN ([`crate::san`]).
    pub san: bool,
    /// Whether the lab is taken down when this process ends, also by a signal.
    pub ephemeral: bool,
}

impl Options {
    /// A lab of `nodes` nodes under the name `name`.
    pub fn new(name: LabName, tier: Tier, nodes: u8) -> Self {
        Self {
            name,
            tier,
            families: tier.families(),
            nodes,
            shared_disk_bytes: SHARED_DISK_BYTES,
            images: Vec::new(),
            node_memory_mib: NODE_MEMORY_MIB,
            watchdog: Watchdog::Bmc,
            san: false,
            ephemeral: false,
        }
    }

    pub(crate) fn node_indices(&self) -> Result<Vec<NodeIndex>> {
        (1..=self.nodes).map(NodeIndex::new).collect()
    }
}

/// What resets an emulated node whose /dev/watchdog is not petted in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Watchdog {
    /// A management controller outside the machine (`bmc.rs`): it fires while the machine is frozen, too.
    Bmc,
    /// QEMU's i6300esb, for hangs and panics. It stops while the machine is frozen. The node boots faster.
    Board,
}

/// Image archives that the environment asks for.
pub fn images_from_env() -> Vec<PathBuf> {
    let images = std::env::var_os("BASCULE_LAB_IMAGES").unwrap_or_default();
    std::env::split_paths(&images)
        .filter(|path| !path.as_os_str().is_empty())
        .collect()
}

/// Sparse; room for a few small guests.
const SHARED_DISK_BYTES: u64 = 8 << 30;
/// 1.0 GiB resident were measured with kubelet and containerd; the rest is for guests.
const NODE_MEMORY_MIB: u32 = 2048;
