//! The fetcher: http or https to standard output, within the allowed addresses.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

/// `bascule-import fetch`
#[derive(Debug, clap::Args)]
pub(crate) struct FetchArgs {
    /// The image: http or https
    #[arg(long)]
    pub(crate) url: String,
    /// A range that may be fetched from although it is loopback or link-local; repeatable
    #[arg(long = "allow")]
    pub(crate) allow: Vec<Range>,
}

/// An address range in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    address: IpAddr,
    prefix: u8,
}

/// Writes the image to standard output.
pub(crate) fn fetch(args: &FetchArgs) -> Result<()> {
    let config = Config::builder()
        .timeout_connect(Some(CONNECT_LIMIT))
        .timeout_recv_response(Some(RESPONSE_LIMIT))
        .max_redirects(REDIRECTS_MAX)
        .build();
    let resolver = PolicyResolver {
        inner: DefaultResolver::default(),
        allow: args.allow.clone(),
    };
    let agent = ureq::Agent::with_parts(config, DefaultConnector::default(), resolver);
    let mut response = agent
        .get(&args.url)
        .call()
        .with_context(|| format!("fetch {}", args.url))?;
    let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
    let mut out = io::stdout().lock();
    io::copy(&mut body, &mut out).with_context(|| format!("fetch {}", args.url))?;
    out.flush().context("write to the writer")
}

/// Resolves as usual, then drops the addresses that an author of a VM must not reach through the
/// node: redirects and DNS answers are checked too, because every connection comes by here.
#[derive(Debug)]
struct PolicyResolver {
    inner: DefaultResolver,
    allow: Vec<Range>,
}

impl Resolver for PolicyResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let all = self.inner.resolve(uri, config, timeout)?;
        let mut allowed = self.empty();
        for address in all
            .iter()
            .filter(|address| permitted(**address, &self.allow))
        {
            allowed.push(*address);
        }
        if allowed.is_empty() {
            let host = uri.host().unwrap_or_default();
            return Err(ureq::Error::Io(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{host} is a loopback or link-local address: not allowed as a source"),
            )));
        }
        Ok(allowed)
    }
}

fn permitted(address: SocketAddr, allow: &[Range]) -> bool {
    let ip = address.ip().to_canonical();
    allow.iter().any(|range| range.contains(ip)) || !is_local(ip)
}

/// The node's own services, cloud metadata services, and nothing routable.
fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_multicast()
                || v4.is_broadcast()
        }
        IpAddr::V6(v6) => {
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_multicast()
                || v6.is_unicast_link_local()
        }
    }
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

const CONNECT_LIMIT: Duration = Duration::from_secs(20);
const RESPONSE_LIMIT: Duration = Duration::from_secs(60);
/// A mirror redirects once or twice.
const REDIRECTS_MAX: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(address: &str, allow: &[&str]) -> bool {
        let allow: Vec<Range> = allow.iter().map(|text| text.parse().unwrap()).collect();
        permitted(SocketAddr::new(address.parse().unwrap(), 80), &allow)
    }

    #[test]
    fn the_nodes_own_services_and_metadata_services_are_no_sources() {
        for address in [
            "127.0.0.1",
            "169.254.169.254",
            "::1",
            "fe80::1",
            "::ffff:127.0.0.1",
        ] {
            assert!(!permits(address, &[]), "{address}");
        }
        assert!(permits("10.1.2.3", &[]));
        assert!(permits("2001:db8::1", &[]));
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
