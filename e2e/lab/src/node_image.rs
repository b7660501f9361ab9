//! The emulated nodes' own disk, kernel and initramfs: Debian, cached.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::cache::cached;
use crate::command::Run;
use crate::image::hex;
use crate::initramfs::Initramfs;

/// The emulated nodes' image.
#[derive(Debug, Clone)]
pub(crate) struct NodeImage {
    dir: PathBuf,
}

impl NodeImage {
    /// Finds it in the cache, or makes it: two minutes on two cores.
    pub(crate) fn ensure() -> Result<Self> {
        let mut recipe = Sha256::new();
        for part in [SUITE, PACKAGES, INIT, &MODULES.join(",")] {
            recipe.update(part);
        }
        let key = format!("node-{SUITE}-{}", &hex(&recipe.finalize())[..12]);
        let what = "making the emulated nodes' disk (once; usually 2 min)";
        Ok(Self {
            dir: cached(&key, what, build)?,
        })
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub(crate) fn initrd(&self) -> PathBuf {
        self.dir.join("initrd")
    }

    /// The root file system, raw. Only overlays of it are written.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("root.img")
    }
}

fn build(dir: &Path) -> Result<()> {
    let (root, staging) = (dir.join("root"), dir.join("staging"));
    bootstrap("minbase", PACKAGES, &root)?;
    fs::create_dir_all(root.join("opt/lab")).context("make the mount point of the programs")?;
    let modules = root.join("usr/lib/modules");
    let version = fs::read_dir(&modules)
        .context("list the kernels")?
        .find_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .context("the node image has no kernel")?;
    fs::copy(
        root.join("boot").join(format!("vmlinuz-{version}")),
        dir.join("vmlinuz"),
    )
    .context("copy the kernel")?;
    let initramfs = Initramfs {
        init: INIT,
        modules_dir: &modules.join(&version),
        modules: MODULES,
        programs: &[],
    };
    initramfs.write(&staging, &dir.join("initrd"))?;
    make_ext4(&root, &dir.join("root.img"), ROOT_SIZE)?;
    fs::remove_dir_all(&root).context("remove the unpacked root")?;
    fs::remove_dir_all(&staging).context("remove the unpacked initramfs")
}

/// Unpacks packages of [`SUITE`] and what they depend on into `root`; variants are those of mmdebstrap(1).
pub(crate) fn bootstrap(variant: &str, packages: &str, root: &Path) -> Result<()> {
    Run::new("mmdebstrap")
        .arg(format!("--variant={variant}"))
        .args(["--mode=root", "--format=directory"])
        .arg(format!("--include={packages}"))
        .arg("--aptopt=Acquire::Languages \"none\"")
        .args(["doc", "man", "locale"].map(|d| format!("--dpkgopt=path-exclude=/usr/share/{d}/*")))
        .arg(SUITE)
        .arg(root)
        .arg(debian_mirror()?)
        .deadline(Duration::from_secs(1800))
        .done()
}

/// An ext4 file system of `size` (as mke2fs takes it) in the file `image`, holding the files of `dir`.
pub(crate) fn make_ext4(dir: &Path, image: &Path, size: &str) -> Result<()> {
    Run::new("mke2fs")
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-m",
            "0",
            "-E",
            "lazy_itable_init=1,root_owner=0:0",
            "-d",
        ])
        .arg(dir)
        .arg(image)
        .arg(size)
        .deadline(Duration::from_secs(600))
        .done()
}

/// The mirror that this machine itself uses for Debian.
fn debian_mirror() -> Result<String> {
    let format = "$(LABEL) $(REPO_URI)";
    let targets = Run::new("apt-get")
        .args(["indextargets", "--format", format, "Created-By: Packages"])
        .text()?;
    parse_mirror(&targets).context("apt knows no Debian mirror on this machine")
}

fn parse_mirror(targets: &str) -> Option<String> {
    let mirror = targets
        .lines()
        .find_map(|line| line.strip_prefix("Debian "));
    mirror.map(|uri| uri.trim().to_owned())
}

/// Kernel 6.12, QEMU 10.0.
pub(crate) const SUITE: &str = "trixie";

const PACKAGES: &str = "linux-image-amd64,kmod,iproute2,nftables,iptables,conntrack,ethtool,socat,\
runc,containernetworking-plugins,e2fsprogs,mount,procps,busybox-static,open-iscsi,dmsetup,ca-certificates";

/// Sparse; images and pods of a scenario take a few hundred megabytes.
const ROOT_SIZE: &str = "6G";

/// What it takes to mount the disks; the node's PID 1 loads the rest. Some are built in.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "crc32c_generic",
    "libcrc32c",
    "crc16",
    "mbcache",
    "jbd2",
    "ext4",
];

/// Finds the disks by serial number, as no udev does here, and hands over to the node's PID 1. With `lab.probe`
/// it prints whether the CPU has nested virtualization and powers off (see `find_accelerator`).
const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
if grep -q lab.probe /proc/cmdline; then
    if grep -qwE 'svm|vmx' /proc/cpuinfo; then echo lab-probe: nested; else echo lab-probe: flat; fi
    sleep 0.2
    poweroff -f
fi
while read -r module; do insmod "/modules/$module"; done < /modules/order
disk() {
    while :; do
        for block in /sys/block/vd*; do
            if [ "$(cat "$block/serial")" = "$1" ]; then echo "/dev/${block##*/}"; return; fi
        done
        usleep 100000
    done
}
mount -t ext4 "$(disk root)" /root || exec sh
mount -t ext4 -o ro "$(disk bin)" /root/opt/lab || exec sh
for dir in dev proc sys; do mount --move "/$dir" "/root/$dir"; done
exec switch_root /root /opt/lab/bin/lab node-init --spec /run/lab/conf/spec.json
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_debians_own_not_another_repository() {
        let targets = "Other https://example.org/apt/\nDebian-Security http://m.example/sec/\n\
                       Debian http://m.example/debian/\n";
        assert_eq!(parse_mirror(targets).unwrap(), "http://m.example/debian/");
        assert_eq!(parse_mirror("Other https://example.org/apt/\n"), None);
    }
}
