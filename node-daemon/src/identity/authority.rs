//! `bascule-node cert`: the certificate authority of nodes without Kubernetes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bascule_ipc::tls::TlsIdentity;
use bascule_pki::Authority;
use bascule_types::{ClusterId, NodeUid};

use super::certificate;
use super::node_identity::Identity;
use crate::files;
use crate::output::show;
use crate::paths::Paths;

/// `bascule-node cert`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum CertCommand {
    /// Create a certificate authority, whose key signs every node of one cluster. Keep the key secret
    Init {
        /// The folder to create it in
        #[arg(long, default_value = "/var/lib/bascule/ca")]
        ca_dir: PathBuf,
    },
    /// Create a node's key, certificate and identity
    Issue {
        /// The certificate authority's folder
        #[arg(long, default_value = "/var/lib/bascule/ca")]
        ca_dir: PathBuf,
        /// The node's state directory, to be copied to the node when it is another host
        #[arg(long, default_value = "/var/lib/bascule")]
        state_dir: PathBuf,
        /// The node's name
        name: String,
    },
}

/// Runs `bascule-node cert`.
pub(crate) fn run(command: &CertCommand) -> Result<()> {
    match command {
        CertCommand::Init { ca_dir } => {
            let cluster = create(ca_dir)?;
            let ca_dir = ca_dir.display();
            show(&format!(
                "Made the certificate authority of cluster {cluster} in {ca_dir}.\n\
                 Next, for each node: bascule-node cert issue NAME --ca-dir {ca_dir}\n"
            ))
        }
        CertCommand::Issue {
            ca_dir,
            state_dir,
            name,
        } => {
            let node = issue(ca_dir, state_dir, name)?.node;
            let state_dir = state_dir.display();
            show(&format!("Issued node {name} ({node}) into {state_dir}.\n"))
        }
    }
}

/// Whether `ca_dir` holds a complete certificate authority.
pub(crate) fn exists(ca_dir: &Path) -> bool {
    ca_dir.join("ca.key").exists()
}

/// Makes the certificate authority of a new cluster.
pub(crate) fn create(ca_dir: &Path) -> Result<ClusterId> {
    if exists(ca_dir) {
        bail!("{} holds a certificate authority already", ca_dir.display());
    }
    let cluster = ClusterId::random();
    let (_, identity) = Authority::create(&cluster.to_string())?;
    // The key last: it marks a complete authority, and without a key `init` may start again.
    files::replace(
        &ca_dir.join("cluster"),
        cluster.to_string().as_bytes(),
        0o644,
    )?;
    files::replace(
        &ca_dir.join("ca.crt"),
        identity.certificate_pem.as_bytes(),
        0o644,
    )?;
    files::replace(&ca_dir.join("ca.key"), identity.key_pem.as_bytes(), 0o600)?;
    Ok(cluster)
}

/// Makes the key, the certificate and the identity of a node, in its state directory.
pub(crate) fn issue(ca_dir: &Path, state_dir: &Path, name: &str) -> Result<Identity> {
    let read = |file: &str| {
        let path = ca_dir.join(file);
        fs::read_to_string(&path)
            .with_context(|| format!("read {} (run `bascule-node cert init`?)", path.display()))
    };
    let (ca_pem, cluster) = (read("ca.crt")?, read("cluster")?);
    let authority = Authority::from_pem(&ca_pem, &read("ca.key")?)?;
    let paths = Paths::new(Path::new("/run/bascule"), state_dir);
    // A node keeps its identity when its certificate is issued again.
    let node = match Identity::load(&paths)? {
        Some(identity) if identity.name == name => identity.node,
        Some(identity) => bail!("{} belongs to node {}", state_dir.display(), identity.name),
        None => NodeUid::random(),
    };
    let leaf = authority.issue_node(node)?;
    let cluster = cluster.trim().parse().context("read the cluster's id")?;
    let identity = Identity {
        node,
        name: name.to_owned(),
        cluster,
    };
    let tls = TlsIdentity {
        key: leaf.key_pem,
        certificate: leaf.certificate_pem,
        authorities: ca_pem,
    };
    certificate::store(&paths, &tls, &identity)?;
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key used to be written first. An interrupted `init` then counted as complete, and `issue`
    /// failed.
    #[test]
    fn an_interrupted_init_is_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let (ca, state) = (folder.path().join("ca"), folder.path().join("state"));
        create(&ca).unwrap();
        for complete in [["ca.crt", "ca.key"].as_slice(), &["ca.key"]] {
            for missing in complete {
                fs::remove_file(ca.join(missing)).unwrap();
            }
            assert!(issue(&ca, &state, "n1").is_err());
            create(&ca).unwrap();
        }
        issue(&ca, &state, "n1").unwrap();
    }

    #[test]
    fn an_authority_is_not_overwritten_and_a_node_keeps_its_identity() {
        let folder = tempfile::tempdir().unwrap();
        let (ca, state) = (folder.path().join("ca"), folder.path().join("state"));
        assert!(issue(&ca, &state, "n1").is_err());
        create(&ca).unwrap();
        assert!(create(&ca).is_err());
        issue(&ca, &state, "n1").unwrap();
        let paths = Paths::new(Path::new("/run/bascule"), &state);
        let first = Identity::load(&paths).unwrap().unwrap();
        issue(&ca, &state, "n1").unwrap();
        assert_eq!(Identity::load(&paths).unwrap().unwrap(), first);
        assert!(issue(&ca, &state, "n2").is_err());
        assert!(certificate::is_current(&paths));
    }
}
