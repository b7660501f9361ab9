//! `bascule-node restart`.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use bascule_ipc::vm::Request as VmRequest;

use super::local_node::{find, supervisor};
use crate::config::NodeConfig;
use crate::output::tell;

/// `bascule-node restart`
#[derive(Debug, clap::Args)]
pub(crate) struct RestartVmArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The VM's name, or namespace/name
    name: String,
}

/// Resets the machine of a VM of this node. Its process, its disks and its ownership stay.
pub(crate) fn restart_vm(args: &RestartVmArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let vm = find(&node, &args.name)?;
    node.vm_request(vm, &VmRequest::Reset)?;
    tell("Reset: the guest boots again.");
    Ok(())
}
