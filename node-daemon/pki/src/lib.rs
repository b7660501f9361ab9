//! Bascule's own certificate authority.
//!
//! All traffic between operator and nodes, and between nodes, is mutual TLS under one authority per
//! cluster. The operator holds its key (in a Secret) and signs a node's request after it has checked
//! the node's token; without Kubernetes, `bascule-node cert init|issue` does. A certificate says
//! what its holder is by a DNS name, [`NODE_TLS_NAME`] or [`OPERATOR_TLS_NAME`], and which node by its
//! common name.
//!
//! This crate knows no sockets and no files; keys and certificates are PEM texts.
#![forbid(unsafe_code)]

use std::time::Duration;

use bascule_types::NodeUid;
pub use bascule_types::{NODE_TLS_NAME, OPERATOR_TLS_NAME};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;

/// The certificate authority of one cluster.
#[derive(Debug)]
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A key and its certificate, PEM.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Identity {
    pub certificate_pem: String,
    /// The private key (PKCS#8).
    pub key_pem: String,
}

/// A fresh key and the request to certify it, PEM.
#[derive(Clone, Debug)]
pub struct Request {
    /// The private key (PKCS#8). It never leaves the node.
    pub key_pem: String,
    /// The PKCS#10 request.
    pub csr_pem: String,
}

/// What is wrong with a key, request or certificate.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A key or certificate cannot be created or read.
    #[error("certificate: {what}")]
    Certificate {
        /// The failed operation.
        what: &'static str,
        /// The error of the X.509 library.
        #[source]
        source: rcgen::Error,
    },
    /// A certificate cannot be parsed.
    #[error("not an X.509 certificate in PEM form")]
    NotACertificate,
}

impl Authority {
    /// Creates an authority. `name`, the cluster's name, is part of its common name.
    ///
    /// # Errors
    /// [`PkiError::Certificate`].
    pub fn create(name: &str) -> Result<(Self, Identity), PkiError> {
        let key = KeyPair::generate().map_err(failed("generate a key"))?;
        let mut params = CertificateParams::new(Vec::new()).map_err(failed("describe the CA"))?;
        params
            .distinguished_name
            .push(DnType::CommonName, format!("Bascule CA {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, AUTHORITY_LIFE);
        let certificate_pem = params
            .self_signed(&key)
            .map_err(failed("sign the CA's certificate"))?
            .pem();
        let identity = Identity {
            certificate_pem,
            key_pem: key.serialize_pem(),
        };
        Ok((
            Self::from_pem(&identity.certificate_pem, &identity.key_pem)?,
            identity,
        ))
    }

    /// The authority with this certificate and key.
    ///
    /// # Errors
    /// [`PkiError::Certificate`].
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let key = KeyPair::from_pem(key_pem).map_err(failed("read the CA's key"))?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key)
            .map_err(failed("read the CA's certificate"))?;
        Ok(Self {
            certificate_pem: certificate_pem.to_owned(),
            issuer,
        })
    }

    /// The authority's certificate, PEM, under which every peer's certificate is verified.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Signs a node's request. Only the public key is taken from the request; name and role are set
    /// here.
    ///
    /// # Errors
    /// [`PkiError::Certificate`] for a request that cannot be read or whose signature is wrong.
    pub fn sign_node(&self, csr_pem: &str, node: NodeUid) -> Result<String, PkiError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(failed("read the certificate request"))?;
        request.params = leaf(NODE_TLS_NAME, &node.to_string())?;
        let certificate = request
            .signed_by(&self.issuer)
            .map_err(failed("sign the certificate"))?;
        Ok(certificate.pem())
    }

    /// Creates the key and certificate of a node that does not enroll itself (embedded mode).
    ///
    /// # Errors
    /// [`PkiError::Certificate`].
    pub fn issue_node(&self, node: NodeUid) -> Result<Identity, PkiError> {
        self.issue(NODE_TLS_NAME, &node.to_string(), &[])
    }

    /// A key and certificate for the operator, which serves under `hosts` too.
    ///
    /// # Errors
    /// [`PkiError::Certificate`].
    pub fn issue_operator(&self, hosts: &[String]) -> Result<Identity, PkiError> {
        self.issue(OPERATOR_TLS_NAME, "operator", hosts)
    }

    fn issue(&self, role: &str, who: &str, hosts: &[String]) -> Result<Identity, PkiError> {
        let key = KeyPair::generate().map_err(failed("generate a key"))?;
        let mut params = leaf(role, who)?;
        for host in hosts {
            let name = host
                .clone()
                .try_into()
                .map_err(failed("read a host name"))?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(failed("sign the certificate"))?;
        Ok(Identity {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

impl Request {
    /// A fresh key and its request.
    ///
    /// # Errors
    /// [`PkiError::Certificate`].
    pub fn generate() -> Result<Self, PkiError> {
        let key = KeyPair::generate().map_err(failed("generate a key"))?;
        let params = CertificateParams::new(Vec::new()).map_err(failed("describe the request"))?;
        let csr = params
            .serialize_request(&key)
            .map_err(failed("sign the request"))?;
        let csr_pem = csr.pem().map_err(failed("write the request"))?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            csr_pem,
        })
    }
}

/// Whether the holder of a DER certificate, already verified by TLS, has this role: [`NODE_TLS_NAME`] or
/// [`OPERATOR_TLS_NAME`].
#[must_use]
pub fn has_role(certificate_der: &[u8], role: &str) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate_der) else {
        return false;
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return false;
    };
    names
        .value
        .general_names
        .iter()
        .any(|name| matches!(name, GeneralName::DNSName(n) if *n == role))
}

/// The node that holds the certificate, if the key fits it and one of the authorities signed it. None
/// for texts that do not belong together, as an interrupted renewal may leave them.
#[must_use]
pub fn holder(key_pem: &str, certificate_pem: &str, authorities_pem: &str) -> Option<NodeUid> {
    let key = KeyPair::from_pem(key_pem).ok()?;
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    let public = &certificate.public_key().subject_public_key.data;
    let mut authorities = Pem::iter_from_buffer(authorities_pem.as_bytes()).flatten();
    let signed = authorities.any(|pem| {
        let authority = pem.parse_x509();
        authority.is_ok_and(|authority| {
            let key = Some(authority.public_key());
            certificate.verify_signature(key).is_ok()
        })
    });
    let fits = signed && key.public_key_raw() == &**public;
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok()?.parse().ok().filter(|_| fits)
}

/// How long a PEM certificate is still valid at `now` (zero when it has expired), and whether it
/// should be renewed: less than a third of its life is left.
///
/// # Errors
/// [`PkiError::NotACertificate`].
pub fn validity(certificate_pem: &str, now: OffsetDateTime) -> Result<(Duration, bool), PkiError> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes())
        .map_err(|_| PkiError::NotACertificate)?;
    let certificate = pem.parse_x509().map_err(|_| PkiError::NotACertificate)?;
    let ends = certificate.validity().not_after.timestamp();
    let life = ends - certificate.validity().not_before.timestamp();
    let left = ends - now.unix_timestamp();
    let left_or_zero = Duration::from_secs(u64::try_from(left).unwrap_or(0));
    Ok((left_or_zero, left < life / 3))
}

fn leaf(role: &str, who: &str) -> Result<CertificateParams, PkiError> {
    let mut params =
        CertificateParams::new(vec![role.to_owned()]).map_err(failed("describe the holder"))?;
    params.distinguished_name.push(DnType::CommonName, who);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, LEAF_LIFE);
    Ok(params)
}

/// A certificate is valid from a day ago, because the nodes' clocks may differ.
fn set_validity(params: &mut CertificateParams, life: time::Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + life;
}

fn failed(what: &'static str) -> impl FnOnce(rcgen::Error) -> PkiError {
    move |source| PkiError::Certificate { what, source }
}

/// The validity of an authority, longer than the expected life of a cluster.
const AUTHORITY_LIFE: time::Duration = time::Duration::days(3650);
/// A certificate is renewed after two thirds of this, so at least 30 days are left when the API server
/// fails: the longest outage of the API server that is supported.
const LEAF_LIFE: time::Duration = time::Duration::days(90);
/// By how much a peer's clock may be behind.
const CLOCK_SKEW: time::Duration = time::Duration::days(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn der(pem: &str) -> Vec<u8> {
        x509_parser::pem::parse_x509_pem(pem.as_bytes())
            .unwrap()
            .1
            .contents
    }

    #[test]
    fn a_signed_request_makes_its_holder_a_node_and_nothing_else() {
        let (authority, _) = Authority::create("test").unwrap();
        let node = NodeUid::random();
        let request = Request::generate().unwrap();
        let certificate = der(&authority.sign_node(&request.csr_pem, node).unwrap());
        assert!(has_role(&certificate, NODE_TLS_NAME));
        assert!(!has_role(&certificate, OPERATOR_TLS_NAME));
        let (_, parsed) = X509Certificate::from_der(&certificate).unwrap();
        assert!(parsed.subject().to_string().contains(&node.to_string()));
    }

    #[test]
    fn a_certificate_request_for_the_operators_name_is_signed_as_a_node() {
        let (authority, _) = Authority::create("test").unwrap();
        let key = KeyPair::generate().unwrap();
        let greedy = CertificateParams::new(vec![OPERATOR_TLS_NAME.to_owned()]).unwrap();
        let csr = greedy.serialize_request(&key).unwrap().pem().unwrap();
        let certificate = der(&authority.sign_node(&csr, NodeUid::random()).unwrap());
        assert!(!has_role(&certificate, OPERATOR_TLS_NAME));
    }

    #[test]
    fn garbage_is_no_request_and_has_no_role() {
        let (authority, _) = Authority::create("test").unwrap();
        assert!(authority.sign_node("garbage", NodeUid::random()).is_err());
        assert!(!has_role(b"garbage", NODE_TLS_NAME));
        assert!(validity("garbage", OffsetDateTime::now_utc()).is_err());
    }

    #[test]
    fn a_key_certificate_and_authority_that_do_not_belong_together_have_no_holder() {
        let (authority, ca) = Authority::create("test").unwrap();
        let (_, foreign) = Authority::create("foreign").unwrap();
        let node = NodeUid::random();
        let (old, new) = (
            authority.issue_node(node).unwrap(),
            authority.issue_node(node).unwrap(),
        );
        let both = format!("{}{}", foreign.certificate_pem, ca.certificate_pem);
        assert_eq!(
            holder(&old.key_pem, &old.certificate_pem, &both),
            Some(node)
        );
        for (key, certificate, authorities) in [
            (&new.key_pem, &old.certificate_pem, &ca.certificate_pem),
            (&old.key_pem, &old.certificate_pem, &foreign.certificate_pem),
            (&ca.key_pem, &ca.certificate_pem, &ca.certificate_pem),
            (&String::new(), &old.certificate_pem, &ca.certificate_pem),
        ] {
            assert_eq!(holder(key, certificate, authorities), None);
        }
    }

    #[test]
    fn a_certificate_is_renewed_when_a_third_of_its_life_is_left() {
        let (authority, _) = Authority::create("test").unwrap();
        let identity = authority
            .issue_operator(&["bascule-operator.bascule.svc".into()])
            .unwrap();
        let now = OffsetDateTime::now_utc();
        assert!(!validity(&identity.certificate_pem, now).unwrap().1);
        let later = now + LEAF_LIFE - time::Duration::days(20);
        assert!(validity(&identity.certificate_pem, later).unwrap().1);
        let (left, due) = validity(&identity.certificate_pem, now + LEAF_LIFE * 2).unwrap();
        assert_eq!((left, due), (Duration::ZERO, true));
    }

    #[test]
    fn an_authority_read_back_signs_what_its_certificate_verifies() {
        let (_, identity) = Authority::create("test").unwrap();
        let again = Authority::from_pem(&identity.certificate_pem, &identity.key_pem).unwrap();
        let leaf = again.issue_node(NodeUid::random()).unwrap();
        let (ca, leaf) = (der(&identity.certificate_pem), der(&leaf.certificate_pem));
        let (_, ca) = X509Certificate::from_der(&ca).unwrap();
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        assert!(leaf.verify_signature(Some(ca.public_key())).is_ok());
    }
}
