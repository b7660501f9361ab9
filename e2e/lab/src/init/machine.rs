//! What an emulated node needs and a native one has from its host: modules, disks and ports by name.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::NodeSpec;
use super::mounts::link_disk;
use crate::command::Run;
use crate::wait::wait_for;

/// Loads modules and gives the shared disks their names.
pub(crate) fn prepare(spec: &NodeSpec) -> Result<()> {
    for module in MODULES {
        // A module may be built in; if it is missing, the step that needs it fails.
        if let Err(error) = Run::new("modprobe")
            .env("PATH", &spec.path)
            .arg(module)
            .done()
        {
            eprintln!("node-init: {error:#}");
        }
    }
    for disk in &spec.disks {
        link_disk(&disk.serial, &disk_by_serial(&disk.serial)?)?;
    }
    Ok(())
}

/// Device of the virtio disk with this serial number.
pub(crate) fn disk_by_serial(serial: &str) -> Result<PathBuf> {
    wait_for(&format!("the disk {serial}"), DEVICE_DEADLINE, || {
        find_by_attribute(Path::new("/sys/block"), "serial", serial)
    })
}

/// Device of the virtio port with this name.
pub(crate) fn port_by_name(name: &str) -> Result<PathBuf> {
    wait_for(&format!("the port {name}"), DEVICE_DEADLINE, || {
        find_by_attribute(Path::new("/sys/class/virtio-ports"), "name", name)
    })
}

fn find_by_attribute(class: &Path, attribute: &str, value: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(class).with_context(|| format!("list {}", class.display()))?;
    let found = entries.filter_map(Result::ok).find(|entry| {
        let text = fs::read_to_string(entry.path().join(attribute));
        text.is_ok_and(|text| text.trim() == value)
    });
    let found = found.with_context(|| format!("no {attribute} {value} in {}", class.display()))?;
    Ok(Path::new("/dev").join(found.file_name()))
}

/// Devices are there within a second of their modules.
const DEVICE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);

/// Modules in load order; modprobe loads their dependencies.
const MODULES: &[&str] = &[
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "kvm_amd",
    "kvm_intel",
    "overlay",
    "bridge",
    "br_netfilter",
    "veth",
    "vxlan",
    "tun",
    "nf_conntrack",
    "nf_tables",
    "nft_chain_nat",
    "vhost_net",
    "loop",
    "fuse",
];
