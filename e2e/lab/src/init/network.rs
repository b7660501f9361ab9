//! A node's network: a management interface, and a bridge with the virtual machines' cable in it.

use std::fs;

use anyhow::{Context, Result};

use super::NodeSpec;
use crate::command::Run;
use crate::names::{HUB_ADDRESS, VM_BRIDGE};

/// Interface of the management network.
pub(crate) const MGMT_INTERFACE: &str = "eth0";
/// Interface of the virtual machines' network.
pub(crate) const VM_INTERFACE: &str = "eth1";

/// Sets up addresses, bridge and routes. The interfaces themselves are there already.
pub(crate) fn configure(spec: &NodeSpec) -> Result<()> {
    let address = format!("{}/24", spec.index.address());
    let gateway = HUB_ADDRESS.to_string();
    let lines: [&[&str]; 9] = [
        &["link", "set", "lo", "up"],
        &["addr", "replace", &address, "dev", MGMT_INTERFACE],
        &["link", "set", MGMT_INTERFACE, "up"],
        // No spanning tree: a learning bridge forwards at once.
        &[
            "link",
            "add",
            VM_BRIDGE,
            "type",
            "bridge",
            "stp_state",
            "0",
            "forward_delay",
            "0",
        ],
        &["link", "set", VM_INTERFACE, "master", VM_BRIDGE],
        &["link", "set", VM_INTERFACE, "up"],
        &["link", "set", VM_BRIDGE, "up"],
        &[
            "route",
            "replace",
            "default",
            "via",
            &gateway,
            "dev",
            MGMT_INTERFACE,
        ],
        &["route", "flush", "cache"],
    ];
    for line in lines {
        Run::new("ip").env("PATH", &spec.path).args(line).done()?;
    }
    for node in spec.nodes.iter().filter(|node| **node != spec.index) {
        let (cidr, via) = (node.pod_cidr(), node.address().to_string());
        let route = [
            "route",
            "replace",
            &cidr,
            "via",
            &via,
            "dev",
            MGMT_INTERFACE,
        ];
        Run::new("ip").env("PATH", &spec.path).args(route).done()?;
    }
    for (name, value) in SYSCTLS {
        let file = format!("/proc/sys/net/ipv4/{name}");
        fs::write(&file, value).with_context(|| format!("write {file}"))?;
    }
    Ok(())
}

/// A node routes for its pods.
const SYSCTLS: [(&str, &str); 2] = [("ip_forward", "1"), ("conf/all/rp_filter", "0")];
