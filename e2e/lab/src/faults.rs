//! Network partitions between the machines of a lab: nftables rules on the hub's bridges.

use anyhow::{Context, Result};

use crate::hub::Hub;
use crate::lab::Lab;
use crate::names::{LabName, MGMT_BRIDGE, NodeIndex, VM_BRIDGE};

/// One end of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variant names say all")]
pub enum Side {
    Node(NodeIndex),
    /// The control plane (and the lab's DNS, web server and test clients).
    Hub,
}

/// A network of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// API, pods, migration streams.
    Management,
    /// The virtual machines' own traffic.
    Vms,
}

impl Network {
    fn bridge(self) -> &'static str {
        match self {
            Self::Management => MGMT_BRIDGE,
            Self::Vms => VM_BRIDGE,
        }
    }
}

impl Lab {
    /// Drops everything that goes from `from` to `to`, in this direction only, until [`Self::heal`].
    pub fn partition(&self, network: Network, from: Side, to: Side) -> Result<()> {
        let rule =
            rule(network, from, to).context("a partition has a node on one side at least")?;
        self.hub()
            .run("nft")
            .args(["-f", "-"])
            .stdin(format!("{TABLE}{rule}\n"))
            .done()
    }

    /// Drops everything between a node and all others, the control plane included, in both directions, on the
    /// management network: the node's virtual machines stay reachable.
    pub fn isolate(&self, node: NodeIndex) -> Result<()> {
        let others = self.nodes().map(|other| Side::Node(other.index()));
        for other in others
            .filter(|other| *other != Side::Node(node))
            .chain([Side::Hub])
        {
            self.partition(Network::Management, Side::Node(node), other)?;
            self.partition(Network::Management, other, Side::Node(node))?;
        }
        Ok(())
    }

    /// Ends all partitions.
    pub fn heal(&self) -> Result<()> {
        // Adding an existing table does nothing; deleting a missing one fails.
        let script = "add table bridge faults\ndelete table bridge faults\n";
        self.hub().run("nft").args(["-f", "-"]).stdin(script).done()
    }
}

/// Parses `hub` or a node's name.
pub fn parse_side(lab: &Lab, name: &str) -> Result<Side> {
    if name == "hub" {
        return Ok(Side::Hub);
    }
    lab.node(name).map(|node| Side::Node(node.index()))
}

fn rule(network: Network, from: Side, to: Side) -> Option<String> {
    let bridge = network.bridge();
    let port = |node| Hub::port(bridge, node);
    match (from, to) {
        (Side::Node(from), Side::Node(to)) => Some(format!(
            "add rule bridge faults forward iifname {} oifname {} drop",
            port(from),
            port(to)
        )),
        (Side::Node(from), Side::Hub) => Some(format!(
            "add rule bridge faults input iifname {} drop",
            port(from)
        )),
        (Side::Hub, Side::Node(to)) => Some(format!(
            "add rule bridge faults output oifname {} drop",
            port(to)
        )),
        (Side::Hub, Side::Hub) => None,
    }
}

/// Everything here is idempotent: the table may be there from an earlier partition.
const TABLE: &str = "\
add table bridge faults
add chain bridge faults forward { type filter hook forward priority 0; }
add chain bridge faults input { type filter hook input priority 0; }
add chain bridge faults output { type filter hook output priority 0; }
";

/// The partitions in force, as nftables rules; `lab status` prints them.
pub(crate) fn describe(name: &LabName) -> String {
    let hub = Hub::new(name);
    hub.run("nft")
        .args(["list", "table", "bridge", "faults"])
        .text()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_direction_has_its_own_rule() {
        let node = |n| Side::Node(NodeIndex::new(n).unwrap());
        let management = |from, to| rule(Network::Management, from, to).unwrap();
        assert!(management(node(1), node(2)).ends_with("forward iifname m-n1 oifname m-n2 drop"));
        assert!(management(node(1), Side::Hub).ends_with("input iifname m-n1 drop"));
        assert!(management(Side::Hub, node(1)).ends_with("output oifname m-n1 drop"));
        assert!(
            rule(Network::Vms, node(1), Side::Hub)
                .unwrap()
                .contains("v-n1")
        );
        assert_eq!(rule(Network::Vms, Side::Hub, Side::Hub), None);
    }
}
