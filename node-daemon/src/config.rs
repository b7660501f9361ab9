//! The options that all commands share: directories, and what the administrator allows VMs to use of
//! this node.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use bascule_node_api::{HTTP_PORT, NODE_PORT, VOLUME_PORTS};
use bascule_types::{ParsePortRangeError, PortRange, UserRange};

use crate::images::SiteConfig;

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
    /// An address range that images may be fetched from although it is loopback, link-local or
    /// otherwise special; repeatable
    #[arg(long = "allow-source", value_name = "CIDR")]
    allow_sources: Vec<String>,
    /// An HTTP proxy for fetching images, `http://[user:password@]host:port`. Prefer the variable: arguments
    /// are visible to every user of this node
    #[arg(
        long,
        value_name = "URL",
        env = "BASCULE_IMAGE_PROXY",
        hide_env_values = true
    )]
    image_proxy: Option<String>,
    /// Hosts that images are fetched from without the proxy, comma-separated
    #[arg(long, value_name = "HOSTS", env = "BASCULE_IMAGE_NO_PROXY")]
    image_no_proxy: Option<String>,
    /// A file with certificate authorities to trust for images beside this node's own, in PEM
    #[arg(long, value_name = "FILE")]
    image_ca: Option<PathBuf>,
    /// Where the programs of this release are [default: beside this one]
    #[arg(long, value_name = "DIR")]
    pub(crate) programs: Option<PathBuf>,
    /// The device of the hardware watchdog; none if there is none
    #[arg(long, value_name = "DEVICE")]
    pub(crate) watchdog: Option<PathBuf>,
    /// Accept the kernel's software watchdog: it cannot reset a machine whose kernel hangs
    #[arg(long)]
    pub(crate) allow_softdog: bool,
    /// The TCP ports on which VMs of this node wait for live migrations, one for each that is under
    /// way; to be opened between nodes in a firewall
    #[arg(long, value_name = "FIRST-LAST", value_parser = migration_ports,
          default_value_t = PortRange::MIGRATION, env = "BASCULE_MIGRATION_PORTS")]
    pub(crate) migration_ports: PortRange,
    /// The ids of users and groups that VM processes get, one each. Nothing else on the node may have one of
    /// them. Not used without root: VM processes then have the user of this command
    #[arg(long, value_name = "FIRST-LAST", default_value_t = UserRange::VMS, env = "BASCULE_VM_USERS")]
    vm_users: UserRange,
    /// Leave the kernel's setting of transparent huge pages for shared memory as it is. Otherwise `serve` lets
    /// guests' RAM have them where it is `never`
    #[arg(long)]
    pub(crate) no_huge_pages: bool,
}

impl NodeConfig {
    pub(crate) fn bridges(&self) -> BTreeMap<String, String> {
        self.bridges.iter().cloned().collect()
    }

    /// The users of VM processes; none without root.
    pub(crate) fn users_of_vms(&self) -> Option<UserRange> {
        rustix::process::geteuid()
            .is_root()
            .then_some(self.vm_users)
    }

    pub(crate) fn host_files(&self) -> BTreeMap<String, PathBuf> {
        self.host_files
            .iter()
            .map(|(name, path)| (name.clone(), path.into()))
            .collect()
    }

    pub(crate) fn image_site(&self) -> ImageSite {
        // An empty variable is as good as none.
        let set = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        ImageSite {
            config: SiteConfig {
                allow: self.allow_sources.clone(),
                proxy: set(&self.image_proxy),
                no_proxy: set(&self.image_no_proxy),
                ca_bundle: None,
            },
            ca_file: self.image_ca.clone(),
        }
    }
}

/// How this node reaches image sources, as its options say.
#[derive(Clone, Debug)]
pub(crate) struct ImageSite {
    config: SiteConfig,
    ca_file: Option<PathBuf>,
}

impl ImageSite {
    /// The configuration at this moment: the file of authorities may have been renewed.
    pub(crate) fn read(&self) -> Result<SiteConfig> {
        let read = |path: &PathBuf| {
            fs::read_to_string(path).with_context(|| format!("read --image-ca {}", path.display()))
        };
        Ok(SiteConfig {
            ca_bundle: self.ca_file.as_ref().map(read).transpose()?,
            ..self.config.clone()
        })
    }
}

/// Bascule's own listeners would lose their ports to a migration.
fn migration_ports(text: &str) -> Result<PortRange, String> {
    let range: PortRange = text
        .parse()
        .map_err(|error: ParsePortRangeError| error.to_string())?;
    let own = OWN_PORTS.into_iter().find(|own| own.overlaps(range));
    own.map_or(Ok(range), |own| {
        Err(format!(
            "Bascule itself listens on {own}: choose ports that are not among these"
        ))
    })
}

/// The ports of the operator and of a node's own processes.
const OWN_PORTS: [PortRange; 2] = [
    PortRange::of(HTTP_PORT, NODE_PORT - HTTP_PORT + 1),
    VOLUME_PORTS,
];

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
    use bascule_node_api::JOIN_PORT;

    use super::*;

    #[test]
    fn migrations_leave_the_ports_of_bascules_own_listeners_alone() {
        assert_eq!(migration_ports("49152-49215"), Ok(PortRange::MIGRATION));
        for taken in ["7410", "7400-7408", "7435-7500", "1-65535"] {
            let error = migration_ports(taken).unwrap_err();
            assert!(error.contains("Bascule itself listens on"), "{error}");
        }
        assert!(migration_ports("49152").is_ok());
        assert!(migration_ports("7436-7499").is_ok());
    }

    #[test]
    fn document_and_chart_name_the_ports_that_are_listened_on() {
        let document = include_str!("../../docs/networking.md");
        let ports = [HTTP_PORT, JOIN_PORT, NODE_PORT].map(|port| port.to_string());
        let ranges = [VOLUME_PORTS, PortRange::MIGRATION].map(|range| range.to_string());
        for row in ports.iter().chain(&ranges) {
            assert!(document.contains(&format!("\n| {row} |")), "{row}");
        }
        let chart = include_str!("../../charts/bascule/values.yaml");
        assert!(chart.contains(&format!("migrationPorts: {}\n", PortRange::MIGRATION)));
    }

    #[test]
    fn a_pair_has_a_name_and_a_value() {
        assert_eq!(pair("lan=br0"), Ok(("lan".into(), "br0".into())));
        for bad in ["lan", "=br0", "lan="] {
            assert_eq!(pair(bad), Err("expected NAME=VALUE".into()), "{bad}");
        }
    }
}
