//! Which addresses an image may be fetched from.
//!
//! A VirtualMachine's author chooses the URL, and the node opens the connection: without a policy the author
//! could read the node's own services and a cloud's metadata service, which hands out credentials. Every
//! address of every connection passes [`permitted`], after name resolution and after each redirect.
//!
//! The table lists the special-purpose registries of RFC 6890 (with its successors up to RFC 9637) and the
//! metadata services of clouds that lie outside of them. Private networks (RFC 1918, RFC 4193) are allowed,
//! because that is where mirrors of images are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// An address range in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    address: IpAddr,
    prefix: u8,
}

/// Whether an image may be fetched from `address`: the administrator allowed its range, or no entry of the
/// table forbids it.
pub(crate) fn permitted(address: SocketAddr, allow: &[Range]) -> bool {
    let ip = address.ip().to_canonical();
    allow.iter().any(|range| range.contains(ip)) || forbidden(ip).is_none()
}

/// What `ip` is, if it must not be fetched from.
pub(crate) fn forbidden(ip: IpAddr) -> Option<&'static str> {
    let ip = ip.to_canonical();
    let listed = FORBIDDEN
        .iter()
        .find(|(text, _)| text.parse::<Range>().is_ok_and(|range| range.contains(ip)))
        .map(|(_, what)| *what);
    // An IPv6 address that a translator turns into an IPv4 address reaches that one.
    listed.or_else(|| match ip {
        IpAddr::V6(v6) => translated(v6).and_then(|v4| forbidden(IpAddr::V4(v4))),
        IpAddr::V4(_) => None,
    })
}

/// The IPv4 address behind the well-known NAT64 prefix (RFC 6052 section 2.1).
fn translated(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let bits = ip.to_bits();
    let well_known = bits >> 32 == NAT64_WELL_KNOWN.to_bits() >> 32;
    let low = u32::try_from(bits & u128::from(u32::MAX)).ok()?;
    well_known.then(|| Ipv4Addr::from_bits(low))
}

impl Range {
    fn contains(self, ip: IpAddr) -> bool {
        match (self.address, ip) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                let shift = 32 - u32::from(self.prefix);
                u64::from(net.to_bits()) >> shift == u64::from(ip.to_bits()) >> shift
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                let shift = 128 - u32::from(self.prefix);
                shift == 128 || net.to_bits() >> shift == ip.to_bits() >> shift
            }
            _ => false,
        }
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a range such as 10.0.0.0/8");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        if prefix > longest {
            Err(wrong())
        } else {
            Ok(Self { address, prefix })
        }
    }
}

/// RFC 6052 section 2.1.
const NAT64_WELL_KNOWN: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);

/// Ranges that no image is fetched from, and what each is.
const FORBIDDEN: &[(&str, &str)] = &[
    // IANA IPv4 special-purpose address registry.
    ("0.0.0.0/8", "an address of this host (RFC 791)"),
    ("127.0.0.0/8", "a loopback address"),
    (
        "169.254.0.0/16",
        "a link-local address, where clouds have their metadata service",
    ),
    (
        "192.0.0.0/24",
        "an address of IETF protocol assignments (RFC 6890)",
    ),
    ("192.0.2.0/24", "a documentation address (RFC 5737)"),
    ("192.88.99.0/24", "a 6to4 relay address (RFC 7526)"),
    ("198.18.0.0/15", "a benchmarking address (RFC 2544)"),
    ("198.51.100.0/24", "a documentation address (RFC 5737)"),
    ("203.0.113.0/24", "a documentation address (RFC 5737)"),
    ("224.0.0.0/4", "a multicast address"),
    ("240.0.0.0/4", "a reserved or broadcast address (RFC 1112)"),
    // IANA IPv6 special-purpose address registry.
    (
        "::/96",
        "a loopback, unspecified or IPv4-compatible address (RFC 4291)",
    ),
    (
        "64:ff9b:1::/48",
        "a local-use translation address (RFC 8215)",
    ),
    ("100::/64", "a discard-only address (RFC 6666)"),
    ("2001::/32", "a Teredo address (RFC 4380)"),
    ("2001:2::/48", "a benchmarking address (RFC 5180)"),
    ("2001:10::/28", "an ORCHID address (RFC 4843)"),
    ("2001:20::/28", "an ORCHIDv2 address (RFC 7343)"),
    ("2001:db8::/32", "a documentation address (RFC 3849)"),
    ("2002::/16", "a 6to4 address (RFC 3056)"),
    ("3fff::/20", "a documentation address (RFC 9637)"),
    ("5f00::/16", "a segment-routing identifier (RFC 9602)"),
    ("fe80::/10", "a link-local address"),
    ("fec0::/10", "a site-local address (RFC 3879)"),
    ("ff00::/8", "a multicast address"),
    // Metadata and host services of clouds outside of the ranges above.
    ("100.100.100.200/32", "Alibaba Cloud's metadata service"),
    ("168.63.129.16/32", "Azure's host service"),
    ("fd00:ec2::/32", "Amazon EC2's metadata and time services"),
    ("fd20:ce::254/128", "Google Cloud's metadata service"),
    ("fd00:42::42/128", "Scaleway's metadata service"),
    ("fd00:c1::a9fe:a9fe/128", "Oracle Cloud's metadata service"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(address: &str, allow: &[&str]) -> bool {
        let allow: Vec<Range> = allow.iter().map(|text| text.parse().unwrap()).collect();
        permitted(SocketAddr::new(address.parse().unwrap(), 80), &allow)
    }

    #[test]
    fn special_addresses_are_no_sources() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "169.254.170.2",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.255",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001:0:1::1",
            "2001:2::1",
            "2001:10::1",
            "2001:2f::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff:1::1",
            "5f00::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!permits(address, &[]), "{address}");
        }
    }

    #[test]
    fn metadata_services_of_clouds_are_no_sources() {
        for address in [
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "fd00:ec2::254",
            "fd00:ec2::123",
            "fd20:ce::254",
            "fd00:42::42",
            "fd00:c1::a9fe:a9fe",
            "fe80::a9fe:a9fe",
        ] {
            assert!(!permits(address, &[]), "{address}");
        }
    }

    #[test]
    fn an_ipv4_address_in_ipv6_clothes_is_judged_as_the_ipv4_address() {
        for address in [
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b::7f00:1",
        ] {
            assert!(!permits(address, &[]), "{address}");
        }
        assert!(permits("::ffff:10.1.2.3", &[]));
        assert!(permits("64:ff9b::808:808", &[]));
    }

    #[test]
    fn public_and_private_addresses_are_sources() {
        for address in [
            "8.8.8.8",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "192.0.1.1",
            "198.20.0.1",
            "223.255.255.255",
            "2600:1f18::1",
            "2001:4860::1",
            "2a00:1450::1",
            "fd12:3456::1",
            "fc00::1",
        ] {
            assert!(permits(address, &[]), "{address}");
        }
    }

    #[test]
    fn every_entry_of_the_table_is_a_range() {
        for (text, what) in FORBIDDEN {
            let range: Range = text.parse().unwrap();
            assert!(forbidden(range.address).is_some(), "{text}: {what}");
        }
    }

    #[test]
    fn an_administrator_can_allow_a_range() {
        assert!(permits("127.0.0.1", &["127.0.0.0/8"]));
        assert!(!permits("127.0.0.1", &["127.0.0.2/32"]));
        assert!(permits("127.0.0.1", &["0.0.0.0/0"]));
        assert!(!permits("::1", &["0.0.0.0/0"]));
        assert!(permits("::1", &["::/0"]));
    }

    #[test]
    fn a_range_that_is_none_is_refused() {
        for bad in ["10.0.0.0", "10.0.0.0/33", "host/8"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }
}
