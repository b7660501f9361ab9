//! The agent's answers, as far as the status shows them. All texts are the guest's.

use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use bascule_devices::net::MacAddress;
use bascule_ipc::vm::{GuestInterface, GuestOs};
use serde::de::{DeserializeOwned, Error as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The result in an answer; none when the agent refuses the request, as one does that an administrator has forbidden it.
///
/// # Errors
/// When it is not an answer.
pub(super) fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<Option<T>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Answer<T> {
        #[serde(rename = "return")]
        result: Option<T>,
        error: Option<IgnoredAny>,
    }
    let answer: Answer<T> = serde_json::from_slice(line)?;
    if answer.result.is_none() && answer.error.is_none() {
        return Err(serde_json::Error::custom("neither a result nor an error"));
    }
    Ok(answer.result)
}

/// Of `guest-info`.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    pub(super) version: String,
}

/// Of `guest-get-host-name`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct HostName {
    pub(super) host_name: String,
}

/// Of `guest-get-osinfo`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct OsInfo {
    id: String,
    version_id: String,
    pretty_name: String,
    kernel_release: String,
}

/// Of `guest-network-get-interfaces`.
pub(super) type Interfaces = List<Interface>;

/// An interface of the guest, or a bridge or bond on it, which has the same MAC address.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Interface {
    hardware_address: Option<String>,
    ip_addresses: Option<List<Address>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Address {
    ip_address: String,
}

impl From<OsInfo> for GuestOs {
    fn from(info: OsInfo) -> Self {
        Self {
            id: info.id,
            version: info.version_id,
            pretty_name: info.pretty_name,
            kernel: info.kernel_release,
        }
    }
}

impl List<Interface> {
    /// The addresses of the VM's interfaces, which have the MAC addresses `macs`.
    pub(super) fn of(&self, macs: &[[u8; 6]]) -> Vec<GuestInterface> {
        let of_one = |&mac: &[u8; 6]| {
            let is_it = |interface: &&Interface| {
                let address = interface.hardware_address.as_deref();
                let address = address.and_then(|text| text.parse::<MacAddress>().ok());
                address == Some(MacAddress(mac))
            };
            let own = self.0.iter().filter(is_it);
            let addresses = own.flat_map(|interface| interface.ip_addresses.iter());
            let addresses = addresses.flat_map(|list| list.0.iter());
            GuestInterface {
                mac,
                addresses: addresses
                    .filter_map(|address| address.ip_address.parse::<IpAddr>().ok())
                    .collect(),
            }
        };
        macs.iter().map(of_one).collect()
    }
}

/// The first [`ITEMS_MAX`] items of a list: a short text can hold very many.
#[derive(Debug)]
pub(super) struct List<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Items<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<List<T>, A::Error> {
                let mut kept = Vec::new();
                while kept.len() < ITEMS_MAX {
                    match items.next_element()? {
                        Some(item) => kept.push(item),
                        None => return Ok(List(kept)),
                    }
                }
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(List(kept))
            }
        }

        deserializer.deserialize_seq(Items(PhantomData))
    }
}

/// Interfaces of a guest, and addresses of one, of which those behind are not looked at.
const ITEMS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answers_of_an_agent_are_read() {
        // As qemu-ga 7.2.22 of Debian 12 gives them, shortened.
        let os = br#"{"return": {"name": "Debian GNU/Linux", "kernel-release": "6.1.0-49-amd64", "version": "12 (bookworm)", "pretty-name": "Debian GNU/Linux 12 (bookworm)", "version-id": "12", "machine": "x86_64", "id": "debian"}}"#;
        let os = GuestOs::from(parse::<OsInfo>(os).unwrap().unwrap());
        assert_eq!((os.id.as_str(), os.version.as_str()), ("debian", "12"));
        assert_eq!(os.kernel, "6.1.0-49-amd64");
        let interfaces = br#"{"return": [{"name": "lo", "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8}], "hardware-address": "00:00:00:00:00:00"}, {"name": "ens4", "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "10.0.0.5", "prefix": 24}], "statistics": {"tx-packets": 1}, "hardware-address": "52:54:00:AA:00:01"}, {"name": "br0", "ip-addresses": [{"ip-address": "2001:db8::5"}, {"ip-address": "10.0.0.5 or so"}], "hardware-address": "52:54:00:aa:00:01"}, {"name": "tun0"}]}"#;
        let mac = [0x52, 0x54, 0, 0xAA, 0, 1];
        let interfaces = parse::<Interfaces>(interfaces).unwrap().unwrap();
        let found = interfaces.of(&[mac, [2; 6]]);
        let addresses: Vec<String> = found[0].addresses.iter().map(IpAddr::to_string).collect();
        assert_eq!(addresses, ["10.0.0.5", "2001:db8::5"]);
        assert!(found[1].mac == [2; 6] && found[1].addresses.is_empty());
    }

    #[test]
    fn a_refused_request_has_no_result_and_other_texts_are_no_answers() {
        let refused = br#"{"error": {"class": "CommandNotFound", "desc": "disabled"}}"#;
        assert!(parse::<Info>(refused).unwrap().is_none());
        let deep = [b"[".repeat(100_000), b"{\"return\":".repeat(100_000)].concat();
        for line in [
            &b""[..],
            b"{}",
            b"null",
            b"{\"return\": 7}",
            b"{\"return\": {\"version\": 7}}",
            b"{\"return\": {\"version\": \"\xFF\"}}",
            b"{\"return\": {\"version\": \"1\"}",
            &deep,
        ] {
            parse::<Info>(line).unwrap_err();
        }
    }

    #[test]
    fn of_a_list_without_end_only_the_beginning_is_kept() {
        let many = format!("{{\"return\": [{}{{}}]}}", "{},".repeat(5000));
        assert_eq!(
            parse::<Interfaces>(many.as_bytes())
                .unwrap()
                .unwrap()
                .0
                .len(),
            ITEMS_MAX
        );
    }
}
