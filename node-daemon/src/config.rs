//! The options that all commands share: directories, and what the administrator allows VMs to use of
//! this node.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Flags that every way of running VMs has in common.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct NodeConfig {
    /// The directory of sockets and other files that are lost at a reboot
    #[arg(long, default_value = "/run/bascule", env = "BASCULE_RUN_DIR")]
    pub(crate) run_dir: PathBuf,
    /// The directory of certificates, programs and local volumes
    #[arg(long, default_value = "/var/lib/bascule", env = "BASCULE_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    /// A bridge that VMs may attach to, by the name that their documents use; repeatable
    #[arg(long = "bridge", value_name = "NAME=DEVICE", value_parser = pair)]
    bridges: Vec<(String, String)>,
    /// A file of this node that VMs may be made from, by a name; repeatable
    #[arg(long = "host-file", value_name = "NAME=PATH", value_parser = pair)]
    host_files: Vec<(String, String)>,
    /// An address range that images may be fetched from although it is loopback or link-local;
    /// repeatable
    #[arg(long = "allow-source", value_name = "CIDR")]
    pub(crate) allow_sources: Vec<String>,
    /// Where the programs of this release are [default: beside this one]
    #[arg(long, value_name = "DIR")]
    pub(crate) programs: Option<PathBuf>,
    /// The device of the hardware watchdog; none if there is none
    #[arg(long, value_name = "DEVICE")]
    pub(crate) watchdog: Option<PathBuf>,
    /// Accept the kernel's software watchdog: it cannot reset a machine whose kernel hangs
    #[arg(long)]
    pub(crate) allow_softdog: bool,
}

impl NodeConfig {
    pub(crate) fn bridges(&self) -> BTreeMap<String, String> {
        self.bridges.iter().cloned().collect()
    }

    pub(crate) fn host_files(&self) -> BTreeMap<String, PathBuf> {
        self.host_files
            .iter()
            .map(|(name, path)| (name.clone(), path.into()))
            .collect()
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_has_a_name_and_a_value() {
        assert_eq!(pair("lan=br0"), Ok(("lan".into(), "br0".into())));
        for bad in ["lan", "=br0", "lan="] {
            assert_eq!(pair(bad), Err("expected NAME=VALUE".into()), "{bad}");
        }
    }
}
