//! The devices of a configuration, in the order that decides their PCI slots.

use anyhow::{Context as _, ensure};
use bascule_devices::rng::{RngConfig, RngDevice};
use bascule_ipc::vm::VmConfig;

use super::volume::Opened;
use crate::VmBuilder;

/// Adds every device: entropy first, then disks, then interfaces.
pub(super) fn add(
    builder: &mut VmBuilder,
    config: &VmConfig,
    _opened: Option<&Opened>,
) -> anyhow::Result<()> {
    let rng = RngConfig {
        name: "rng0".to_owned(),
    };
    let rng = RngDevice::new(&rng, builder.device_context()).context("rng0")?;
    builder.add_device(Box::new(rng.function))?;
    ensure!(
        config.disks.is_empty() && config.interfaces.is_empty(),
        "no disks or interfaces yet"
    );
    Ok(())
}
