//! The lab's own certificate authority, and kubeconfigs.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};

use crate::addresses::Family;
use crate::names::API_PORT;

/// The certificate authority of one lab, with its directory.
#[derive(Debug)]
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    family: Family,
}

/// Who a certificate speaks for.
#[derive(Debug, Clone, Default)]
pub struct Subject<'a> {
    /// Common name: the Kubernetes user.
    pub user: &'a str,
    /// Organization: the Kubernetes group.
    pub group: Option<&'a str>,
    /// DNS names of a server.
    pub names: Vec<String>,
    /// Addresses of a server.
    pub addresses: Vec<IpAddr>,
}

/// A certificate with its key, both PEM.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Certificate.
    pub cert: String,
    /// Private key, PKCS #8.
    pub key: String,
}

impl Pki {
    /// A new authority; `ca.crt`, `ca.key` and the service-account key `sa.key`, `sa.pub` are put into `dir`.
    pub fn create(dir: &Path, family: Family) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let key = KeyPair::generate().context("generate the CA's key")?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "bascule-lab");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let ca_pem = params.self_signed(&key).context("sign the CA")?.pem();
        fs::write(dir.join("ca.crt"), &ca_pem).context("write ca.crt")?;
        fs::write(dir.join("ca.key"), key.serialize_pem()).context("write ca.key")?;
        let sa = KeyPair::generate().context("generate the service-account key")?;
        fs::write(dir.join("sa.key"), sa.serialize_pem()).context("write sa.key")?;
        fs::write(dir.join("sa.pub"), sa.public_key_pem()).context("write sa.pub")?;
        Ok(Self {
            dir: dir.to_owned(),
            issuer: Issuer::new(params, key),
            ca_pem,
            family,
        })
    }

    /// The authority that an earlier process made in `dir`.
    pub fn open(dir: &Path, family: Family) -> Result<Self> {
        let read = |name: &str| {
            fs::read_to_string(dir.join(name)).with_context(|| format!("read the lab's {name}"))
        };
        let (ca_pem, key) = (read("ca.crt")?, read("ca.key")?);
        let key = KeyPair::from_pem(&key).context("parse ca.key")?;
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, key).context("parse ca.crt")?;
        Ok(Self {
            dir: dir.to_owned(),
            issuer,
            ca_pem,
            family,
        })
    }

    /// The authority's certificate, PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A new key and a certificate for it, good for client and server.
    pub fn issue(&self, subject: &Subject<'_>) -> Result<Identity> {
        let key = KeyPair::generate().context("generate a key")?;
        let mut params = CertificateParams::new(subject.names.clone()).context("server names")?;
        params
            .distinguished_name
            .push(DnType::CommonName, subject.user);
        if let Some(group) = subject.group {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        params
            .subject_alt_names
            .extend(subject.addresses.iter().copied().map(SanType::IpAddress));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let cert = params
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("sign a certificate for {}", subject.user))?;
        Ok(Identity {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Issues into `NAME.crt` and `NAME.key` and returns their paths.
    pub fn issue_files(&self, name: &str, subject: &Subject<'_>) -> Result<(PathBuf, PathBuf)> {
        let identity = self.issue(subject)?;
        let (cert, key) = (
            self.dir.join(format!("{name}.crt")),
            self.dir.join(format!("{name}.key")),
        );
        fs::write(&cert, identity.cert).with_context(|| format!("write {}", cert.display()))?;
        fs::write(&key, identity.key).with_context(|| format!("write {}", key.display()))?;
        Ok((cert, key))
    }

    /// A kubeconfig that speaks for `user`, as JSON, which is YAML, too.
    pub fn kubeconfig(&self, user: &str, group: Option<&str>) -> Result<Value> {
        let identity = self.issue(&Subject {
            user,
            group,
            ..Subject::default()
        })?;
        Ok(json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {
                "server": format!("https://{}", SocketAddr::new(self.family.hub(), API_PORT)),
                "certificate-authority-data": STANDARD.encode(&self.ca_pem),
            }}],
            "users": [{"name": user, "user": {
                "client-certificate-data": STANDARD.encode(identity.cert),
                "client-key-data": STANDARD.encode(identity.key),
            }}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
            "current-context": "lab",
        }))
    }

    /// A kubeconfig in `NAME.kubeconfig`.
    pub fn kubeconfig_file(&self, name: &str, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.kubeconfig"));
        fs::write(&path, self.kubeconfig(user, group)?.to_string())
            .with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_that_was_reopened_signs_in_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let made = Pki::create(dir.path(), Family::V4).unwrap();
        let opened = Pki::open(dir.path(), Family::V4).unwrap();
        assert_eq!(made.ca_pem(), opened.ca_pem());
        let (cert, key) = opened
            .issue_files(
                "x",
                &Subject {
                    user: "x",
                    ..Subject::default()
                },
            )
            .unwrap();
        assert!(
            fs::read_to_string(cert)
                .unwrap()
                .contains("BEGIN CERTIFICATE")
        );
        assert!(
            fs::read_to_string(key)
                .unwrap()
                .contains("BEGIN PRIVATE KEY")
        );
    }

    #[test]
    fn a_kubeconfig_speaks_for_its_user_to_the_hub() {
        let dir = tempfile::tempdir().unwrap();
        let config = |family| {
            let pki = Pki::create(dir.path(), family).unwrap();
            pki.kubeconfig("jane", None).unwrap()
        };
        let server = |family| config(family)["clusters"][0]["cluster"]["server"].clone();
        assert_eq!(server(Family::V4), "https://10.90.0.1:6443");
        assert_eq!(server(Family::V6), "https://[fd00:90::1]:6443");
        let config = config(Family::V6);
        assert_eq!(config["contexts"][0]["context"]["user"], "jane");
    }
}
