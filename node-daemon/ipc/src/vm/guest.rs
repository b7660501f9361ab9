//! What the agent in a guest says of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The agent in a guest that was given a port for one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestAgent {
    /// No program in the guest has the port open: no agent runs, or the guest is still booting.
    Absent,
    /// An agent has the port open, and has yet to answer this process.
    Waiting,
    /// It answers, and said this last.
    Connected(Box<GuestInfo>),
    /// It has the port open, and does not answer.
    Silent,
}

/// What an agent says. The guest chooses all of it: only its form is checked, by [`GuestInfo::bounded`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestInfo {
    /// The release of the agent.
    pub agent_version: String,
    /// The guest's host name.
    pub host_name: String,
    /// The operating system.
    pub os: GuestOs,
    /// The interfaces of the guest that have the MAC address of one of the VM's.
    pub interfaces: Vec<GuestInterface>,
}

/// An operating system, as its `os-release` names it. Empty where the guest does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestOs {
    /// Such as `debian`.
    pub id: String,
    /// Such as `13`.
    pub version: String,
    /// Such as `Debian GNU/Linux 13 (trixie)`.
    pub pretty_name: String,
    /// The release of the kernel that runs.
    pub kernel: String,
}

/// The addresses of one of the VM's interfaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// The address by which it is known.
    pub mac: [u8; 6],
    /// IPv4 before IPv6, without those that are of use on the guest's own link only.
    pub addresses: Vec<IpAddr>,
}

impl GuestInfo {
    /// The same within the bounds of a status, without characters that a terminal would obey. Whoever receives it from
    /// another process applies it again.
    #[must_use]
    pub fn bounded(self) -> Self {
        let mut interfaces = self.interfaces;
        interfaces.truncate(INTERFACES_MAX);
        for interface in &mut interfaces {
            let is_link_local = |address: &IpAddr| match address {
                IpAddr::V4(v4) => v4.is_loopback() || v4.is_unspecified(),
                IpAddr::V6(v6) => {
                    v6.is_loopback() || v6.is_unspecified() || v6.is_unicast_link_local()
                }
            };
            interface.addresses.retain(|one| !is_link_local(one));
            interface.addresses.sort_unstable();
            interface.addresses.dedup();
            interface.addresses.truncate(ADDRESSES_MAX);
        }
        Self {
            agent_version: text(&self.agent_version),
            host_name: text(&self.host_name),
            os: GuestOs {
                id: text(&self.os.id),
                version: text(&self.os.version),
                pretty_name: text(&self.os.pretty_name),
                kernel: text(&self.os.kernel),
            },
            interfaces,
        }
    }
}

/// At most [`TEXT_CHARS_MAX`] characters of `raw`, without control characters and those that turn the direction of a
/// text or cannot be seen.
fn text(raw: &str) -> String {
    let shown = raw.chars().filter(|&c| !c.is_control() && !is_format(c));
    let text: String = shown.take(TEXT_CHARS_MAX).collect();
    text.trim().to_owned()
}

const fn is_format(c: char) -> bool {
    matches!(
        c,
        '\u{AD}' | '\u{61C}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}'
    )
}

/// As a VirtualMachine has.
const INTERFACES_MAX: usize = 8;
/// More than one needs that is told which address to use.
const ADDRESSES_MAX: usize = 16;
/// As long as a host name may be.
const TEXT_CHARS_MAX: usize = 253;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_cut_to_the_bounds_of_a_status() {
        let interface = GuestInterface {
            mac: [2; 6],
            addresses: (0..100_u32)
                .map(|at| IpAddr::V4((0x0A00_0000 + at).into()))
                .collect(),
        };
        let said = GuestInfo {
            agent_version: "7".repeat(300),
            interfaces: vec![interface; 9],
            ..GuestInfo::default()
        };
        let bounded = said.bounded();
        assert_eq!(bounded.agent_version.len(), TEXT_CHARS_MAX);
        assert_eq!(bounded.interfaces.len(), INTERFACES_MAX);
        assert_eq!(bounded.interfaces[0].addresses.len(), ADDRESSES_MAX);
    }

    /// A status is printed to terminals: a guest could have moved the cursor, or hidden what follows.
    #[test]
    fn no_character_reaches_a_status_that_a_terminal_obeys() {
        let said = GuestInfo {
            host_name: " we\u{1B}[2Jb\r\n\u{9B}1m\u{202E}\u{7F}\0 ".into(),
            os: GuestOs {
                pretty_name: "Débian 13 (trixie) 木".into(),
                ..GuestOs::default()
            },
            ..GuestInfo::default()
        };
        let bounded = said.bounded();
        assert_eq!(bounded.host_name, "we[2Jb1m");
        assert_eq!(bounded.os.pretty_name, "Débian 13 (trixie) 木");
        assert_eq!(bounded.clone().bounded(), bounded);
    }

    #[test]
    fn addresses_are_in_one_order_and_those_of_the_link_are_left_out() {
        let addresses = [
            "fe80::1",
            "2001:db8::1",
            "127.0.0.1",
            "10.0.0.9",
            "::1",
            "10.0.0.9",
            "10.0.0.2",
        ];
        let interface = GuestInterface {
            mac: [2; 6],
            addresses: addresses.map(|text| text.parse().unwrap()).to_vec(),
        };
        let said = GuestInfo {
            interfaces: vec![interface],
            ..GuestInfo::default()
        };
        let shown: Vec<String> = said.bounded().interfaces[0]
            .addresses
            .iter()
            .map(IpAddr::to_string)
            .collect();
        assert_eq!(shown, ["10.0.0.2", "10.0.0.9", "2001:db8::1"]);
    }
}
