//! Names and addresses. Everything that a lab creates is named after the lab, so that it can be found and removed even
//! after the process that created it was killed.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Name of a lab: up to ten lower-case letters, digits and inner dashes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// Network namespace of the hub: control plane, bridges and taps live in it.
    pub fn hub_netns(&self) -> String {
        format!("{}hub", self.netns_prefix())
    }

    /// Network namespace of a native node.
    pub fn node_netns(&self, node: &str) -> String {
        format!("{}{node}", self.netns_prefix())
    }

    /// What the names of all of this lab's network namespaces begin with.
    pub fn netns_prefix(&self) -> String {
        format!("bl.{}.", self.0)
    }

    /// The cgroup, below every hierarchy's root, that holds every process of this lab.
    pub fn cgroup(&self) -> String {
        format!("bascule-lab-{}", self.0)
    }

    /// The name as text, as paths, cgroups and interfaces contain it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabName {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            (1..=10).contains(&name.len())
                && name.chars().all(allowed)
                && !name.starts_with('-')
                && !name.ends_with('-'),
            "lab name {name:?}: use 1 to 10 lower-case letters, digits and inner dashes"
        );
        Ok(Self(name.to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Position of a node in its lab, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeIndex(u8);

impl NodeIndex {
    /// Highest number of nodes: the last octet of their addresses has room for it.
    pub const COUNT_MAX: u8 = 50;

    /// Index `index`, counted from 1.
    pub fn new(index: u8) -> Result<Self> {
        ensure!(
            (1..=Self::COUNT_MAX).contains(&index),
            "a lab has 1 to {} nodes",
            Self::COUNT_MAX
        );
        Ok(Self(index))
    }

    /// Node name, `n1` and so on.
    pub fn name(self) -> String {
        format!("n{}", self.0)
    }

    /// MAC address of one of the node's interfaces (0: management, 1: virtual machines).
    pub fn mac(self, interface: u8) -> String {
        format!("02:ba:5c:00:{interface:02x}:{:02x}", self.0)
    }

    /// The number itself, from 1.
    pub fn number(self) -> u8 {
        self.0
    }
}

/// Serial number of the disk that all nodes share: `/dev/disk/by-id/virtio-shared0` on every node.
pub const SHARED_DISK: &str = "shared0";
/// The hub's address on the network that the virtual machines share; guests take 10.91.0.100 and up.
pub const HUB_VM_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 91, 0, 1);
/// Port of the API server on the hub.
pub const API_PORT: u16 = 6443;
/// Port of the lab's web server (kernel, initramfs, disk images) on the hub.
pub const WEB_PORT: u16 = 8080;
/// Bridge, in the hub, of the management network.
pub const MGMT_BRIDGE: &str = "mgmt";
/// Bridge of the virtual machines' network: in the hub and, under the same name, on every node.
pub const VM_BRIDGE: &str = "vmbr0";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_name_has_at_most_ten_lower_case_letters_digits_and_hyphens() {
        for good in ["a", "demo", "t-1", "0123456789"] {
            assert_eq!(good.parse::<LabName>().unwrap().as_str(), good);
        }
        for bad in ["", "Demo", "a_b", "-a", "a-", "01234567890", "a/b", "a.b"] {
            assert!(bad.parse::<LabName>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn one_labs_namespaces_are_never_taken_for_anothers() {
        let (short, long): (LabName, LabName) = ("a".parse().unwrap(), "a-b".parse().unwrap());
        assert!(!long.hub_netns().starts_with(&short.netns_prefix()));
        assert!(!short.hub_netns().starts_with(&long.netns_prefix()));
    }

    #[test]
    fn nodes_have_names_and_mac_addresses_of_their_own() {
        let first = NodeIndex::new(1).unwrap();
        assert_eq!(first.name(), "n1");
        assert_eq!(first.mac(1), "02:ba:5c:00:01:01");
        assert!(NodeIndex::new(50).is_ok());
        assert!(NodeIndex::new(0).is_err() && NodeIndex::new(51).is_err());
    }
}
