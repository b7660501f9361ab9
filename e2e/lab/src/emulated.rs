//! Nodes of the emulated tier.
use crate::init::DiskSpec;
use crate::lab::Lab;
use crate::machine::{MachineContext, NodePlan};
use crate::names::NodeIndex;
use crate::process::ProcessId;
use crate::tools::Tools;
use anyhow::{Result, bail};
use std::path::PathBuf;
#[derive(Debug)]
pub(crate) struct Assets;
impl Assets {
    pub(crate) fn ensure(_: &Tools, _: &[PathBuf]) -> Result<Self> {
        bail!("not yet")
    }
}
pub(crate) fn plan(_: &[NodeIndex], _: Vec<DiskSpec>, _: usize) -> NodePlan {
    unreachable!()
}
pub(crate) fn prepare_node(_: &Lab, _: NodeIndex, _: &Assets, _: u32) -> Result<()> {
    bail!("not yet")
}
pub(crate) fn start(_: &MachineContext<'_>, _: NodeIndex) -> Result<ProcessId> {
    bail!("not yet")
}
