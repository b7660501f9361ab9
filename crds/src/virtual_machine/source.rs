//! Where the contents of a new disk, a kernel or an initrd come from.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::label::is_label;
use super::secret_ref::TextSource;

/// Where an image comes from: exactly one of http and hostFile.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.http) != has(self.hostFile)").message("set exactly one of http and hostFile"))]
pub struct Source {
    /// An image that is fetched by HTTP and checked against its hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpSource>,
    /// A file on the nodes that an administrator has given a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_file: Option<HostFileSource>,
}

/// An image that is fetched by HTTP: exactly one of sha256 and sha512 says what it must be.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.sha256) != has(self.sha512)").message("set exactly one of sha256 and sha512"),
    validation = Rule::new("!has(self.authorizationFrom) || self.url.startsWith('https://')").message("authorizationFrom needs an https:// URL: over http:// everyone on the way could read the header"),
    validation = Rule::new("!has(self.authorizationFrom) || !self.url.matches('^https?://[^/]*@')").message("set authorizationFrom or user and password in the URL, not both"),
)]
pub struct HttpSource {
    /// Where it is, http:// or https://. The importer follows no redirect out of the addresses that
    /// the administrator allows.
    #[schemars(length(max = 2048))]
    #[x_kube(validation = Rule::new("self.matches('^https?://[^/ ]+/[^ ]*$')").message("url must begin with http:// or https://, name a host and have a path"))]
    pub url: String,
    /// The SHA-256 of the file at the URL, 64 hexadecimal digits in lower case, as sha256sum prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9a-f]{64}$')").message("sha256 must be 64 hexadecimal digits in lower case, as sha256sum prints them"))]
    pub sha256: Option<String>,
    /// The SHA-512 of the file at the URL, 128 hexadecimal digits in lower case, as sha512sum prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9a-f]{128}$')").message("sha512 must be 128 hexadecimal digits in lower case, as sha512sum prints them"))]
    pub sha512: Option<String>,
    /// Certificate authorities to trust for this source beside those that the administrator has set
    /// up, in PEM: for a server with a certificate of a private authority. At most 16384 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16384))]
    #[x_kube(validation = Rule::new("self.contains('-----BEGIN CERTIFICATE-----') && !self.contains('PRIVATE KEY')").message("caBundle holds certificates in PEM and nothing else"))]
    pub ca_bundle: Option<String>,
    /// Takes the value of the HTTP header Authorization from a Secret, for example "Bearer TOKEN" or "Basic" and
    /// user:password in base64: at most 8192 visible ASCII characters, all of the header's value. Only with an
    /// https:// URL. Read anew for each attempt, and sent to scheme, host and port of the URL only, not to a server
    /// elsewhere that it redirects to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authorization_from: Option<TextSource>,
}

/// A file on the nodes, by the name that an administrator gave it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostFileSource {
    /// Its name in the administrator's allow-list: the chart's value node.hostFiles, or
    /// --host-file NAME=PATH without Kubernetes. Never a path.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("hostFile.name is a name from the administrator's allow-list, not a path: lower-case letters, digits and hyphens"))]
    pub name: String,
}

/// A source with exactly one kind set, as the schema promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind<'a> {
    /// By HTTP.
    Http(&'a HttpSource),
    /// From the allow-list.
    HostFile(&'a HostFileSource),
}

impl Source {
    /// Which kind this is; none when the document sets both or neither.
    #[must_use]
    pub const fn kind(&self) -> Option<SourceKind<'_>> {
        match (&self.http, &self.host_file) {
            (Some(http), None) => Some(SourceKind::Http(http)),
            (None, Some(file)) => Some(SourceKind::HostFile(file)),
            _ => None,
        }
    }

    /// Calls `require` with every rule: whether it holds, the field, which is `field` or below it, and what to
    /// write instead.
    pub(super) fn check(&self, field: &str, require: &mut impl FnMut(bool, &str, &str)) {
        require(self.kind().is_some(), field, ONE_KIND);
        if let Some(http) = &self.http {
            http.check(&format!("{field}.http"), require);
        }
        if let Some(file) = &self.host_file {
            let named = is_label(&file.name);
            require(named, &format!("{field}.hostFile.name"), HOST_FILE);
        }
    }
}

impl HttpSource {
    fn check(&self, field: &str, require: &mut impl FnMut(bool, &str, &str)) {
        let authority = self.authority();
        let good = authority.is_some_and(|authority| !authority.is_empty())
            && !self.url.contains(char::is_whitespace);
        require(good, &format!("{field}.url"), URL);
        let one = self.sha256.is_some() != self.sha512.is_some();
        require(one, field, ONE_DIGEST);
        if let Some(bundle) = &self.ca_bundle {
            let good = bundle.len() <= CA_BUNDLE_MAX
                && bundle.contains("-----BEGIN CERTIFICATE-----")
                && !bundle.contains("PRIVATE KEY");
            require(good, &format!("{field}.caBundle"), CA_BUNDLE);
        }
        if let Some(sha256) = &self.sha256 {
            let good = is_hexadecimal(sha256, 64);
            require(good, &format!("{field}.sha256"), SHA256);
        }
        if let Some(sha512) = &self.sha512 {
            let good = is_hexadecimal(sha512, 128);
            require(good, &format!("{field}.sha512"), SHA512);
        }
        if let Some(from) = &self.authorization_from {
            let field = format!("{field}.authorizationFrom");
            let encrypted = self.url.starts_with("https://");
            require(encrypted, &field, AUTHORIZATION_IN_CLEAR);
            let named = authority.is_some_and(|authority| authority.contains('@'));
            require(!named, &field, ONE_AUTHORIZATION);
            from.secret_key_ref.check(&field, require);
        }
    }

    /// User information, host and port of the URL; none for a URL of another scheme or without a path.
    fn authority(&self) -> Option<&str> {
        let rest = self.url.strip_prefix("http://");
        let rest = rest.or_else(|| self.url.strip_prefix("https://"))?;
        Some(rest.split_once('/')?.0)
    }
}

/// In lower case, with so many digits.
fn is_hexadecimal(text: &str, digits: usize) -> bool {
    text.len() == digits
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

const ONE_KIND: &str = "set exactly one of http and hostFile";
const HOST_FILE: &str = "a name from the administrator's allow-list, not a path";
const URL: &str = "url must begin with http:// or https://, name a host and have a path";
const ONE_DIGEST: &str = "set exactly one of sha256 and sha512";
const CA_BUNDLE: &str =
    "caBundle holds certificates in PEM and nothing else, in at most 16384 characters";
/// In bytes: eight authorities with RSA keys.
const CA_BUNDLE_MAX: usize = 16_384;
const SHA256: &str = "sha256 must be 64 hexadecimal digits in lower case, as sha256sum prints them";
const SHA512: &str =
    "sha512 must be 128 hexadecimal digits in lower case, as sha512sum prints them";
const AUTHORIZATION_IN_CLEAR: &str =
    "needs an https:// URL: over http:// everyone on the way could read the header";
const ONE_AUTHORIZATION: &str = "set authorizationFrom or user and password in the URL, not both";

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of a source with this `http` that are wrong.
    fn bad_fields(http: &str) -> Vec<String> {
        let digest = format!("sha256: '{}'", "a".repeat(64));
        let text = format!("{{http: {{{http}, {digest}}}}}");
        let source: Source = serde_saphyr::from_str(&text).unwrap();
        let mut bad = Vec::new();
        source.check("source", &mut |holds, field, _| {
            if !holds {
                bad.push(field.to_owned());
            }
        });
        bad
    }

    #[test]
    fn an_authorization_header_goes_over_https_only_and_not_beside_a_password() {
        let from = "authorizationFrom: {secretKeyRef: {name: images, key: authorization}}";
        let of = |url: &str| bad_fields(&format!("url: '{url}', {from}"));
        for good in [
            "https://images.example/a",
            "https://images.example:8443/a@b?c=d@e",
        ] {
            assert_eq!(of(good), Vec::<String>::new(), "{good}");
        }
        for bad in [
            "http://images.example/a",
            "https://user:password@images.example/a",
            "https://user@images.example/a",
        ] {
            assert_eq!(of(bad), ["source.http.authorizationFrom"], "{bad}");
            // Without the header, both are as they were.
            assert_eq!(bad_fields(&format!("url: '{bad}'")), Vec::<String>::new());
        }
    }

    #[test]
    fn an_authorization_refers_to_a_secret_by_the_rules_of_cloud_init() {
        for (secret, field) in [
            ("name: ../images, key: a", "name"),
            ("name: images, key: ''", "key"),
            ("name: images, key: a/b", "key"),
        ] {
            let from = format!("authorizationFrom: {{secretKeyRef: {{{secret}}}}}");
            let bad = bad_fields(&format!("url: 'https://images.example/a', {from}"));
            let field = format!("source.http.authorizationFrom.secretKeyRef.{field}");
            assert_eq!(bad, [field], "{secret}");
        }
    }
}
