//! What an emulated node needs and a native one has from its host: kernel modules and named shared disks.

use anyhow::Result;

use super::NodeSpec;
use super::device_names::disk_by_serial;
use super::mounts::link_disk;
use crate::command::Run;

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
    "sch_ingress",
    "cls_bpf",
    "nf_conntrack",
    "nf_tables",
    "nft_chain_nat",
    "vhost_net",
    "loop",
    "fuse",
];
