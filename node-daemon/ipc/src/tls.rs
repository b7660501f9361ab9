//! The node's TLS identity, as files that `bascule-node` writes and every process of the node reads.
//!
//! # Constraints
//! - The identity is renewed while other processes read it, and its writer may be killed between any
//!   two steps. A key with the certificate of another key can be used neither by a server nor by a
//!   client.
//!
//! # Layout
//! | file | contents, PEM |
//! |---|---|
//! | [`BUNDLE`] | the private key, the node's certificate, the authority's certificates |
//! | [`KEY`], [`CERTIFICATE`], [`AUTHORITIES`] | the same three in a file each, the layout of earlier releases |
//!
//! # Guarantees
//! The bundle is replaced by one rename and read in one go, so a reader gets the old identity or the
//! new one. The three files have no such guarantee; they are read only where there is no bundle.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The file with the whole identity.
pub const BUNDLE: &str = "node.pem";
/// The private key, in the layout of three files.
pub const KEY: &str = "node.key";
/// The node's certificate, in the layout of three files.
pub const CERTIFICATE: &str = "node.crt";
/// The authority's certificates, in the layout of three files.
pub const AUTHORITIES: &str = "ca.crt";

/// A node's identity, PEM.
#[derive(Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct TlsIdentity {
    pub key: String,
    /// The node's certificate.
    pub certificate: String,
    /// The authorities' certificates under which a peer's certificate is verified, usually one.
    pub authorities: String,
}

/// A folder holds no usable TLS identity.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum TlsFilesError {
    /// A file cannot be read.
    #[error("read {path}")]
    Io {
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// A bundle is incomplete.
    #[error("{path} holds no {what}")]
    Lacks {
        path: PathBuf,
        /// The missing part.
        what: &'static str,
    },
}

impl TlsIdentity {
    /// Reads the identity in `folder`: the bundle, or else the three files.
    ///
    /// # Errors
    /// [`TlsFilesError`], which names the file.
    pub fn read(folder: &Path) -> Result<Self, TlsFilesError> {
        let path = folder.join(BUNDLE);
        match fs::read_to_string(&path) {
            Ok(text) => {
                Self::from_bundle(&text).map_err(|what| TlsFilesError::Lacks { path, what })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::read_three(folder),
            Err(source) => Err(TlsFilesError::Io { path, source }),
        }
    }

    fn read_three(folder: &Path) -> Result<Self, TlsFilesError> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|source| TlsFilesError::Io { path, source })
        };
        Ok(Self {
            certificate: read(CERTIFICATE)?,
            key: read(KEY)?,
            authorities: read(AUTHORITIES)?,
        })
    }

    /// The contents of [`BUNDLE`].
    #[must_use]
    pub fn to_bundle(&self) -> String {
        let parts = [&self.key, &self.certificate, &self.authorities];
        let mut text = String::new();
        for part in parts {
            text.push_str(part.trim());
            text.push('\n');
        }
        text
    }

    /// Parses a bundle.
    ///
    /// # Errors
    /// The name of the first missing part.
    pub fn from_bundle(text: &str) -> Result<Self, &'static str> {
        let (keys, mut certificates): (Vec<_>, Vec<_>) = blocks(text)
            .into_iter()
            .partition(|block| block.lines().next().is_some_and(is_key));
        let key = keys.into_iter().next().ok_or("private key")?;
        if certificates.len() < 2 {
            return Err("node certificate and authority");
        }
        let certificate = certificates.remove(0);
        Ok(Self {
            key,
            certificate,
            authorities: certificates.concat(),
        })
    }
}

/// Leaves the private key out, so that it does not get into logs.
impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsIdentity")
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}

/// The PEM blocks of a text (RFC 7468), each with its lines from BEGIN to END.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in text.lines() {
        if line.starts_with("-----BEGIN ") {
            block = Some(String::new());
        }
        if let Some(open) = &mut block {
            open.push_str(line);
            open.push('\n');
        }
        if line.starts_with("-----END ") {
            blocks.extend(block.take());
        }
    }
    blocks
}

fn is_key(begin: &str) -> bool {
    begin.trim_end().ends_with("PRIVATE KEY-----")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(label: &str, body: &str) -> String {
        format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
    }

    fn identity(name: &str) -> TlsIdentity {
        TlsIdentity {
            key: pem("PRIVATE KEY", &format!("{name}K")),
            certificate: pem("CERTIFICATE", &format!("{name}C")),
            authorities: pem("CERTIFICATE", "A1") + &pem("CERTIFICATE", "A2"),
        }
    }

    fn write_three(folder: &Path, identity: &TlsIdentity) {
        fs::write(folder.join(KEY), &identity.key).unwrap();
        fs::write(folder.join(CERTIFICATE), &identity.certificate).unwrap();
        fs::write(folder.join(AUTHORITIES), &identity.authorities).unwrap();
    }

    #[test]
    fn an_identity_reads_back_from_its_bundle() {
        let identity = identity("one");
        assert_eq!(
            TlsIdentity::from_bundle(&identity.to_bundle()),
            Ok(identity)
        );
    }

    #[test]
    fn a_folder_of_three_files_is_read_and_a_bundle_takes_precedence() {
        let folder = tempfile::tempdir().unwrap();
        write_three(folder.path(), &identity("old"));
        assert_eq!(TlsIdentity::read(folder.path()).unwrap(), identity("old"));
        let bundle = identity("new").to_bundle();
        fs::write(folder.path().join(BUNDLE), bundle).unwrap();
        assert_eq!(TlsIdentity::read(folder.path()).unwrap(), identity("new"));
    }

    #[test]
    fn the_error_names_the_missing_part() {
        let folder = tempfile::tempdir().unwrap();
        let error = TlsIdentity::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains(CERTIFICATE), "{error}");
        for (cut, lacks) in [
            ("", "private key"),
            (&*identity("x").key, "node certificate and authority"),
        ] {
            fs::write(folder.path().join(BUNDLE), cut).unwrap();
            let error = TlsIdentity::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains(BUNDLE) && error.contains(lacks), "{error}");
        }
    }

    #[test]
    fn the_key_is_not_shown() {
        let shown = format!("{:?}", identity("secret"));
        assert!(!shown.contains("secretK"), "{shown}");
    }
}
