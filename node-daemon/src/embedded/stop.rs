//! `bascule-node stop`.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Result, bail};
use bascule_ipc::vm::Request as VmRequest;

use super::local_node::{find, forget, supervisor};
use crate::config::NodeConfig;
use crate::output::tell;
use crate::processes::vms::{Presence, is_over};
use crate::wait::wait_for;

/// `bascule-node stop`
#[derive(Debug, clap::Args)]
pub(crate) struct StopVmArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The VM's name, or namespace/name
    name: String,
    /// Stop the guest now, without waiting for it to shut down
    #[arg(long)]
    force: bool,
}

/// Stops a VM of this node and removes its process.
pub(crate) fn stop_vm(args: &StopVmArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let vm = find(&node, &args.name)?;
    let watch = node.watch(vm)?;
    if args.force {
        node.vm_request(vm, &VmRequest::Stop)?;
    } else {
        node.vm_request(vm, &VmRequest::PowerButton)?;
        tell(format_args!(
            "Told the guest to shut down; waiting until it is off."
        ));
    }
    let over = || match node.presence(vm) {
        Presence::Responding(status) if is_over(&status.state) => Some(status.pid),
        Presence::Responding(_) | Presence::Unresponsive(_) => None,
        Presence::Ended(_) | Presence::Absent => Some(0),
    };
    match wait_for(SHUTDOWN_LIMIT, over) {
        Some(pid) => {
            drop(watch);
            forget(&node, vm, pid)?;
            tell(format_args!("Stopped."));
            Ok(())
        }
        None => match node.vm_waits_for(vm) {
            Some(what) => bail!("the guest is not off yet: it waits for {what}"),
            None => {
                bail!("the guest has not shut down; `bascule-node stop --force` stops it now")
            }
        },
    }
}

const SHUTDOWN_LIMIT: Duration = Duration::from_secs(120);
