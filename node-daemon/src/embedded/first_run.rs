//! The first `run` on a machine without any setup: creates an identity and a volume in a local file,
//! and prints both with their paths to standard error.
//!
//! Local volumes are made only on a node whose identity `run` has made. On a node of a cluster a
//! volume that is not attached is more likely one that must be joined; a new file of the same name
//! would start a second, empty copy of its VMs.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bascule_ipc::volume::FencingMode;
use bascule_node_api::command::{Backing, FormatOptions, Outcome};
use bascule_types::Bytes;

use super::document::Document;
use super::local_node::{attach, check_rights, supervisor};
use crate::config::NodeConfig;
use crate::identity::{Identity, authority};
use crate::output::tell;
use crate::paths::Paths;
use crate::processes::supervisor::Supervisor;

/// This node; creates its identity if it has none.
pub(super) fn node_with_identity(
    config: &NodeConfig,
    address: IpAddr,
    no_cgroups: bool,
) -> Result<Supervisor> {
    check_rights(config, no_cgroups)?;
    let paths = Paths::new(&config.run_dir, &config.state_dir);
    if Identity::load(&paths)?.is_none() {
        make_identity(config, &paths)?;
    }
    supervisor(config, address, no_cgroups)
}

fn make_identity(config: &NodeConfig, paths: &Paths) -> Result<()> {
    let ca_dir = config.state_dir.join("ca");
    if !authority::exists(&ca_dir) {
        authority::create(&ca_dir)?;
    }
    // Before the identity: the folder marks a node that may create local volumes.
    let volumes = paths.local_volumes();
    fs::create_dir_all(&volumes).with_context(|| format!("create {}", volumes.display()))?;
    let name = rustix::system::uname();
    let name = name.nodename().to_str().unwrap_or("localhost");
    let identity = authority::issue(&ca_dir, &config.state_dir, name)?;
    tell(format_args!(
        "Made an identity for this node, {} ({}), in {}, with a certificate authority of its own.",
        identity.name,
        identity.node,
        config.state_dir.display()
    ));
    Ok(())
}

/// A volume file that this run has made.
#[derive(Debug)]
pub(super) struct MadeVolume {
    pub(super) path: PathBuf,
}

/// Attaches the document's volume: the one at `backing`, or the one that is attached already, or the
/// local file of an earlier run, or a new local file.
pub(super) fn attach_or_make(
    node: &Supervisor,
    document: &Document,
    backing: Option<&Path>,
) -> Result<Option<MadeVolume>> {
    let name = &document.spec.volume;
    let local = node.paths.local_volumes();
    if backing.is_some() || node.volume_status(name).is_ok() || !local.exists() {
        attach(node, name, backing)?;
        return Ok(None);
    }
    let path = local.join(format!("{name}.img"));
    if path.exists() {
        attach(node, name, Some(&path))?;
        return Ok(None);
    }
    let size = volume_size(document);
    if let Err(error) =
        format_file(node, &path, size).and_then(|()| attach(node, name, Some(&path)))
    {
        // The next run must not take an unformatted file for the volume.
        drop(fs::remove_file(&path));
        return Err(error);
    }
    tell(format_args!(
        "Made volume {name} in the file {}, {} GiB, sparse: only written blocks take disk space.",
        path.display(),
        size.0 >> 30
    ));
    Ok(Some(MadeVolume { path }))
}

fn format_file(node: &Supervisor, path: &Path, size: Bytes) -> Result<()> {
    let backing = Backing::File {
        path: path.to_owned(),
        size: Some(size),
    };
    let options = FormatOptions::new(FencingMode::LeaseOnly);
    match node.format_volume(&backing, node.identity.cluster, &options)? {
        Outcome::Formatted { .. } => Ok(()),
        other => bail!("format answered {other:?}"),
    }
}

/// Twice the size of the document's disks and memory, which leaves space for more disks and for saved
/// states.
fn volume_size(document: &Document) -> Bytes {
    let disks: u64 = (document.disks.iter())
        .filter_map(|disk| disk.fill.as_ref())
        .map(|(size, _)| size.0)
        .fold(document.spec.memory.0, u64::saturating_add);
    let wanted = disks.saturating_mul(2).max(VOLUME_BYTES_MIN);
    Bytes(wanted.checked_next_multiple_of(1 << 30).unwrap_or(wanted))
}

/// 16 GiB. The file is sparse.
const VOLUME_BYTES_MIN: u64 = 16 << 30;
