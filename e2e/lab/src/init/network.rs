//! A node's network: a management interface, and a bridge with the virtual machines' cable in it.

use std::fs;

use anyhow::{Context, Result};

use super::NodeSpec;
use crate::addresses::Family;
use crate::command::Run;
use crate::names::VM_BRIDGE;

/// Interface of the management network.
pub(crate) const MGMT_INTERFACE: &str = "eth0";
/// Interface of the virtual machines' network.
pub(crate) const VM_INTERFACE: &str = "eth1";

/// Sets up addresses, bridge and routes. The interfaces themselves are there already.
pub(crate) fn configure(spec: &NodeSpec) -> Result<()> {
    let lines: [&[&str]; 6] = [
        &["link", "set", "lo", "up"],
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
    ];
    for line in lines {
        ip(spec, line)?;
    }
    spec.families
        .each()
        .try_for_each(|family| configure_family(spec, family))
}

fn ip(spec: &NodeSpec, args: &[&str]) -> Result<()> {
    Run::new("ip").env("PATH", &spec.path).args(args).done()
}

/// The node's address and routes of one family.
fn configure_family(spec: &NodeSpec, family: Family) -> Result<()> {
    let (own, prefix) = (family.node(spec.index), family.management_prefix());
    let address = format!("{own}/{prefix}");
    let gateway = family.hub().to_string();
    let to_gateway = ["via", &gateway, "dev", MGMT_INTERFACE];
    // No duplicate address detection: it delays the address by a second.
    let replace = ["addr", "replace", &address, "dev", MGMT_INTERFACE, "nodad"];
    ip(spec, &replace)?;
    let default = ["route", "replace", "default"];
    ip(spec, &[&default[..], &to_gateway].concat())?;
    for node in spec.nodes.iter().filter(|node| **node != spec.index) {
        let (cidr, via) = (family.pods_of(*node), family.node(*node).to_string());
        let route = [
            "route",
            "replace",
            &cidr,
            "via",
            &via,
            "dev",
            MGMT_INTERFACE,
        ];
        ip(spec, &route)?;
    }
    for (name, value) in sysctls(family) {
        let file = format!("/proc/sys/net/{name}");
        fs::write(&file, value).with_context(|| format!("write {file}"))?;
    }
    Ok(())
}

/// A node routes for its pods.
fn sysctls(family: Family) -> &'static [(&'static str, &'static str)] {
    match family {
        Family::V4 => &[("ipv4/ip_forward", "1"), ("ipv4/conf/all/rp_filter", "0")],
        Family::V6 => &[("ipv6/conf/all/forwarding", "1")],
    }
}
