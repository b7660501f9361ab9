//! Addresses of a cluster's network: nodes, pods, Services. The guests' own network is IPv4 in every lab.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::names::NodeIndex;

/// The address families of a cluster's nodes, pods and Services. Unless another choice is made, native labs are
/// IPv6-only and emulated labs IPv4-only: the scenarios that both tiers run show both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Families {
    first: Family,
    second: Option<Family>,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the variant names say all")]
pub enum Family {
    V4,
    V6,
}

impl Families {
    /// Dual stack; nodes and Services have an IPv4 address first.
    pub const DUAL: Self = Self {
        first: Family::V4,
        second: Some(Family::V6),
    };

    /// One family alone.
    pub(crate) const fn only(first: Family) -> Self {
        Self {
            first,
            second: None,
        }
    }

    /// The first one: that of the control plane and of addresses of which there is only one.
    pub fn first(self) -> Family {
        self.first
    }

    /// All of them.
    pub fn each(self) -> impl Iterator<Item = Family> {
        std::iter::once(self.first).chain(self.second)
    }

    /// A value for each, comma-separated, as Kubernetes' options take them.
    pub fn list<T: ToString>(self, of: impl Fn(Family) -> T) -> String {
        let values: Vec<String> = self.each().map(|family| of(family).to_string()).collect();
        values.join(",")
    }
}

impl Family {
    /// The control plane, the lab's DNS and its web server, on the management network.
    pub fn hub(self) -> IpAddr {
        self.management(1)
    }

    /// A node on the management network.
    pub fn node(self, node: NodeIndex) -> IpAddr {
        self.management(10 + node.number())
    }

    fn management(self, host: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 90, 0, host).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x90, 0, 0, 0, 0, 0, host.into()).into(),
        }
    }

    /// Length of the management network's prefix, bits.
    pub fn management_prefix(self) -> u8 {
        match self {
            Self::V4 => 24,
            Self::V6 => 64,
        }
    }

    /// Every address of this machine: what a server listens on.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// Pod network of all nodes together.
    pub fn pods(self) -> &'static str {
        match self {
            Self::V4 => "10.92.0.0/16",
            Self::V6 => "fd00:92::/48",
        }
    }

    /// The node's share of the pod network.
    pub fn pods_of(self, node: NodeIndex) -> String {
        let number = node.number();
        match self {
            Self::V4 => format!("10.92.{number}.0/24"),
            Self::V6 => format!("fd00:92:0:{number:x}::/64"),
        }
    }

    /// Every destination: a default route.
    pub fn everywhere(self) -> &'static str {
        match self {
            Self::V4 => "0.0.0.0/0",
            Self::V6 => "::/0",
        }
    }

    /// Addresses of Services.
    pub fn services(self) -> &'static str {
        match self {
            Self::V4 => "10.93.0.0/16",
            // The API server takes at most 20 bits of hosts.
            Self::V6 => "fd00:93::/108",
        }
    }

    /// The first Service: the API server as pods see it.
    pub fn api_service(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 93, 0, 1).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x93, 0, 0, 0, 0, 0, 1).into(),
        }
    }

    /// Zone of the names of addresses in DNS.
    pub fn reverse_zone(self) -> &'static str {
        match self {
            Self::V4 => "in-addr.arpa",
            Self::V6 => "ip6.arpa",
        }
    }

    /// The loopback address.
    pub fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Tier;

    #[test]
    fn nodes_and_their_pods_have_addresses_of_their_own() {
        let (first, last) = (NodeIndex::new(1).unwrap(), NodeIndex::new(50).unwrap());
        assert_eq!(Family::V4.node(first).to_string(), "10.90.0.11");
        assert_eq!(Family::V4.node(last).to_string(), "10.90.0.60");
        assert_eq!(Family::V4.pods_of(last), "10.92.50.0/24");
        assert_eq!(Family::V6.node(first).to_string(), "fd00:90::b");
        assert_eq!(Family::V6.node(last).to_string(), "fd00:90::3c");
        assert_eq!(Family::V6.pods_of(last), "fd00:92:0:32::/64");
    }

    #[test]
    fn a_dual_stack_cluster_has_a_list_for_each_option() {
        let node = NodeIndex::new(1).unwrap();
        let nodes = |families: Families| families.list(|family| family.node(node));
        assert_eq!(nodes(Families::DUAL), "10.90.0.11,fd00:90::b");
        assert_eq!(nodes(Tier::Native.families()), "fd00:90::b");
        assert_eq!(nodes(Tier::Emulated.families()), "10.90.0.11");
    }
}
