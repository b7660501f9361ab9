//! The fetcher: http or https to standard output, within the allowed addresses.
//!
//! It reads one [`FetchJob`] as JSON from standard input, so that no password, of the URL, the proxy or the header
//! Authorization, is in the process list. It runs as user nobody with an empty environment.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_image::HEADER_BYTES;
use bascule_types::{RedactedUrl, SourceAuthorization};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport,
};
use ureq::{Proxy, ProxyProtocol};

use super::length_limit::LengthLimit;
use super::read_full::read_full;
use super::source_policy::{Range, forbidden, permitted};

mod redirect;
mod requests;
mod transfer;

use requests::Requests;
use transfer::{PAUSE, Transfer};

/// What the fetcher is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FetchJob {
    /// The process that starts the fetcher, and that the fetcher does not outlive.
    pub(crate) parent: u32,
    pub(crate) url: String,
    pub(crate) limit: LengthLimit,
    /// Certificate authorities to trust for this source alone, in PEM.
    pub(crate) ca_bundle: Option<String>,
    /// The header for the URL's own origin, and for no other one.
    #[serde(default)]
    pub(crate) authorization: Option<SourceAuthorization>,
    pub(crate) site: SiteConfig,
}

/// How this node reaches image sources: the same for all of them, set by the administrator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SiteConfig {
    /// Ranges that may be fetched from although the policy forbids them, in CIDR notation.
    pub(crate) allow: Vec<String>,
    /// An HTTP proxy, `http://[user:password@]host:port`, for both http and https.
    pub(crate) proxy: Option<String>,
    /// Hosts that are reached without the proxy, comma-separated, as in the variable NO_PROXY.
    pub(crate) no_proxy: Option<String>,
    /// Certificate authorities to trust beside those of the node, in PEM.
    pub(crate) ca_bundle: Option<String>,
}

/// Writes the image to standard output.
pub(crate) fn fetch() -> Result<()> {
    // From here on, a death of the parent is this process' own.
    set_parent_process_death_signal(Some(Signal::KILL)).context("follow the parent")?;
    let job: FetchJob = serde_json::from_reader(io::stdin().lock()).context("read the job")?;
    let parent = getppid().and_then(|pid| u32::try_from(pid.as_raw_pid()).ok());
    if parent != Some(job.parent) {
        bail!("the import has ended");
    }
    fetch_to(&job, &mut io::stdout().lock())
}

fn fetch_to(job: &FetchJob, out: &mut impl Write) -> Result<()> {
    let url: Uri = job.url.parse().context("the URL is not valid")?;
    if let Some(host) = url.host()
        && is_cluster_name(host)
    {
        bail!(
            "{host} is a name of the cluster's DNS, which a node does not use to fetch images: use a \
             name or an address that nodes can reach, such as an Ingress or a NodePort"
        );
    }
    let shown = RedactedUrl(&job.url);
    let agent = agent(&job.site, job.ca_bundle.as_deref(), SILENCE_LIMIT)?;
    let requests = Requests {
        agent,
        url: &url,
        authorization: job.authorization.as_ref(),
    };
    let mut image = Transfer::begin(requests, &shown, PAUSE)?;
    let announced = image.length();
    if let Some(announced) = announced {
        job.limit.check_packed(announced)?;
    }
    let mut header = [0; HEADER_BYTES];
    let length = read_full(&mut image, &mut header).with_context(|| format!("fetch {shown}"))?;
    let header = header.get(..length).unwrap_or_default();
    if let Some(announced) = announced {
        job.limit.check_announced(announced, header)?;
    }
    out.write_all(header).context("write to the writer")?;
    io::copy(&mut image, out).with_context(|| format!("fetch {shown}"))?;
    out.flush().context("write to the writer")
}

fn agent(site: &SiteConfig, ca_bundle: Option<&str>, silence: Duration) -> Result<ureq::Agent> {
    let allow: Vec<Range> = site
        .allow
        .iter()
        .map(|text| Range::from_str(text))
        .collect::<Result<_, _>>()
        .map_err(anyhow::Error::msg)?;
    let proxy = site.proxy.as_deref().map(|proxy| parse_proxy(proxy, site));
    let proxy = proxy.transpose()?;
    let proxy_host = proxy.as_ref().map(|proxy| proxy.host().to_owned());
    let tls = TlsConfig::builder().root_certs(roots(site.ca_bundle.as_deref(), ca_bundle)?);
    let config = Config::builder()
        .timeout_connect(Some(CONNECT_LIMIT))
        .timeout_recv_response(Some(RESPONSE_LIMIT))
        .timeout_per_read(Some(silence))
        .max_redirects(REDIRECTS_MAX)
        .tls_config(tls.build())
        .proxy(proxy)
        .build();
    let resolver = PolicyResolver {
        inner: DefaultResolver::default(),
        allow: allow.clone(),
        proxy_host: proxy_host.clone(),
    };
    let policy = PolicyConnector { allow, proxy_host };
    let connector = ().chain(policy).chain(DefaultConnector::default());
    Ok(ureq::Agent::with_parts(config, connector, resolver))
}

/// The proxy, with the hosts that go around it.
fn parse_proxy(text: &str, site: &SiteConfig) -> Result<Proxy> {
    let wrong = || {
        format!(
            "the image proxy {} is not http://host:port",
            RedactedUrl(text)
        )
    };
    let given = Proxy::new(text).ok().with_context(wrong)?;
    if !matches!(given.protocol(), ProxyProtocol::Http | ProxyProtocol::Https) {
        bail!(wrong());
    }
    let mut builder = Proxy::builder(given.protocol())
        .host(given.host())
        .port(given.port());
    if let Some(username) = given.username() {
        builder = builder.username(username);
    }
    if let Some(password) = given.password() {
        builder = builder.password(password);
    }
    let hosts = site.no_proxy.as_deref().unwrap_or_default().split(',');
    for host in hosts.map(str::trim).filter(|host| !host.is_empty()) {
        builder = builder.no_proxy(host);
    }
    builder.build().ok().with_context(wrong)
}

/// The node's own trust store, the site's bundle and the source's; where the node has none of its own, the
/// roots of Mozilla that were built in.
fn roots(site: Option<&str>, source: Option<&str>) -> Result<RootCerts> {
    let own = rustls_native_certs::load_native_certs().certs;
    let mut certificates: Vec<Certificate<'static>> = own
        .iter()
        .map(|der| Certificate::from_der(der).to_owned())
        .collect();
    if let Some(pem) = site {
        certificates.extend(parse_bundle(pem, "the CA bundle for image sources")?);
    }
    if let Some(pem) = source {
        certificates.extend(parse_bundle(pem, "http.caBundle")?);
    }
    if certificates.is_empty() {
        Ok(RootCerts::WebPki)
    } else {
        Ok(RootCerts::Specific(Arc::new(certificates)))
    }
}

/// The certificates in `pem`, which messages call `name`.
fn parse_bundle(pem: &str, name: &str) -> Result<Vec<Certificate<'static>>> {
    let mut certificates = Vec::new();
    for item in parse_pem(pem.as_bytes()) {
        match item.with_context(|| format!("read {name}"))? {
            PemItem::Certificate(certificate) => certificates.push(certificate),
            _ => bail!("{name} holds something else than certificates"),
        }
    }
    if certificates.is_empty() {
        bail!("{name} holds no certificate");
    }
    Ok(certificates)
}

/// A name that only the cluster's DNS knows.
fn is_cluster_name(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    host.ends_with(".svc") || host.ends_with(".cluster.local") || host == "kubernetes.default"
}

/// Resolves as usual, then drops the addresses that an author of a VM must not reach through the
/// node: redirects and DNS answers are checked too, because every direct connection passes here.
#[derive(Debug)]
struct PolicyResolver {
    inner: DefaultResolver,
    allow: Vec<Range>,
    proxy_host: Option<String>,
}

impl Resolver for PolicyResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let all = self.inner.resolve(uri, config, timeout)?;
        let host = uri.host().unwrap_or_default();
        if self.proxy_host.as_deref() == Some(host) {
            // The administrator chose the proxy.
            return Ok(all);
        }
        let mut allowed = self.empty();
        let permitted = |address: &&SocketAddr| permitted(**address, &self.allow);
        for address in all.iter().filter(permitted) {
            allowed.push(*address);
        }
        if allowed.is_empty() {
            let first = all.iter().next().map(SocketAddr::ip);
            return Err(refusal(host, first));
        }
        Ok(allowed)
    }
}

/// Checks the address in the URL of a connection that goes through the proxy, which this process does not
/// resolve. A name is left to the proxy, whose own policy applies.
#[derive(Debug)]
struct PolicyConnector {
    allow: Vec<Range>,
    proxy_host: Option<String>,
}

impl<In: Transport> Connector<In> for PolicyConnector {
    type Out = In;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<In>, ureq::Error> {
        let host = details.uri.host().unwrap_or_default();
        let literal = host.trim_matches(['[', ']']).parse::<IpAddr>();
        match literal {
            Ok(ip)
                if self.proxy_host.as_deref() != Some(host)
                    && !permitted(SocketAddr::new(ip, 0), &self.allow) =>
            {
                Err(refusal(host, Some(ip)))
            }
            _ => Ok(chained),
        }
    }
}

fn refusal(host: &str, address: Option<IpAddr>) -> ureq::Error {
    let what = address.and_then(forbidden).unwrap_or("no address");
    ureq::Error::Io(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("{host} is {what}: not allowed as a source"),
    ))
}

const CONNECT_LIMIT: Duration = Duration::from_secs(20);
const RESPONSE_LIMIT: Duration = Duration::from_secs(60);
/// Without any byte on a connection.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// A mirror redirects once or twice.
const REDIRECTS_MAX: u32 = 5;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_server;
