//! A node's view of the file system.
//!
//! Native: the host's own root, with what a node changes replaced by directories of its own: /run, /var/lib,
//! /var/log, /dev, /sys (of its network namespace) and the cgroup hierarchies (of its cgroup namespace).
//! Emulated: what an init system mounts.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};

use super::{NativeSpec, NodeSpec};
use crate::cgroup::{Cgroup, delegate_controllers};
use crate::config::NODE_CONF;

/// Mounts of a native node.
pub(crate) fn mount_native(spec: &NodeSpec, native: &NativeSpec) -> Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).context("make mounts private")?;
    mount_fs("sysfs", "/sys", c"")?;
    mount_cgroups(native)?;
    make_dev(spec, native)?;
    // The node's configuration may lie below a directory that is about to be covered.
    bind(&native.conf, Path::new("/mnt"))?;
    bind(&native.var_lib, Path::new("/var/lib"))?;
    bind(&native.var_log, Path::new("/var/log"))?;
    mount_fs("tmpfs", "/run", c"mode=755")?;
    fs::create_dir_all(NODE_CONF).context("make the configuration directory")?;
    rustix::mount::mount_move("/mnt", NODE_CONF).context("move the configuration")?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    mount_change("/", shared).context("make mounts shared, as pods with mount propagation need")
}

/// Mounts of an emulated node, as far as the initramfs has not done it.
pub(crate) fn mount_machine() -> Result<()> {
    mount_fs("cgroup2", "/sys/fs/cgroup", c"")?;
    join_init_scope()?;
    mount_fs("tmpfs", "/run", c"mode=755")?;
    mount_fs("tmpfs", "/tmp", c"mode=1777")?;
    for (kind, dir) in [("devpts", "/dev/pts"), ("tmpfs", "/dev/shm")] {
        fs::create_dir_all(dir).with_context(|| format!("make {dir}"))?;
        mount_fs(kind, dir, c"")?;
    }
    fs::create_dir_all(NODE_CONF).context("make the configuration directory")?;
    let disk = super::device_names::disk_by_serial("conf")?;
    mount(disk, NODE_CONF, "ext4", MountFlags::RDONLY, None).context("mount the configuration")?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    mount_change("/", shared).context("make mounts shared")
}

/// What is neither pod nor guest shares one weight beside theirs, as under systemd, whose own cgroup has this name: in the
/// root cgroup each of its threads would weigh as much as all guests together.
fn join_init_scope() -> Result<()> {
    let scope = Cgroup::at("init.scope")?;
    scope.create()?;
    scope.join()
}

/// Opens a service's log: a file, or in an emulated node a virtio port by its name.
pub(crate) fn open_log(log: &Path) -> Result<File> {
    let path = if log.is_absolute() {
        log.to_owned()
    } else {
        super::device_names::port_by_name(&log.to_string_lossy())?
    };
    let file = OpenOptions::new()
        .create(path == log)
        .append(true)
        .open(&path);
    file.with_context(|| format!("open {}", path.display()))
}

/// `/dev/disk/by-id/virtio-SERIAL`, which no udev makes here.
pub(crate) fn link_disk(serial: &str, device: &Path) -> Result<()> {
    let dir = Path::new("/dev/disk/by-id");
    fs::create_dir_all(dir).context("make /dev/disk/by-id")?;
    symlink(device, dir.join(format!("virtio-{serial}"))).with_context(|| format!("link {serial}"))
}

fn mount_fs(kind: &str, dir: &str, options: &CStr) -> Result<()> {
    mount(kind, dir, kind, MountFlags::empty(), options)
        .with_context(|| format!("mount {kind} on {dir}"))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount_bind(from, to).with_context(|| format!("bind {} to {}", from.display(), to.display()))
}

/// The same hierarchies at the same places, seen from the root of the node's cgroup namespace: what a node puts
/// into `/x` is not what another one puts there.
fn mount_cgroups(native: &NativeSpec) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    if native.cgroups.iter().any(|h| h.mount != root) {
        mount_fs("tmpfs", "/sys/fs/cgroup", c"mode=755")?;
    }
    for hierarchy in &native.cgroups {
        let dir = &hierarchy.mount;
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let (kind, options) = match &hierarchy.v1_options {
            Some(options) => ("cgroup", options.as_str()),
            None => ("cgroup2", ""),
        };
        let options = std::ffi::CString::new(options).context("cgroup options")?;
        mount(kind, dir, kind, MountFlags::empty(), options.as_c_str())
            .with_context(|| format!("mount {kind} on {}", dir.display()))?;
        if hierarchy.v1_options.is_none() && dir == root {
            // With v2 alone, a cgroup whose children have controllers has no processes itself.
            let init = dir.join("init");
            fs::create_dir_all(&init).context("make the cgroup of PID 1")?;
            fs::write(init.join("cgroup.procs"), "0").context("enter the cgroup of PID 1")?;
            delegate_controllers(dir)?;
        }
    }
    Ok(())
}

/// A /dev with only the device nodes that the node's specification lists.
fn make_dev(spec: &NodeSpec, native: &NativeSpec) -> Result<()> {
    let disks = spec.disks.iter().filter_map(|disk| disk.device.clone());
    let listed = native
        .devices
        .iter()
        .map(|name| Path::new("/dev").join(name));
    let nodes: Vec<(PathBuf, fs::Metadata)> = listed
        .chain(disks)
        .filter_map(|path| Some((path.clone(), fs::metadata(path).ok()?)))
        .collect();
    mount_fs("tmpfs", "/dev", c"mode=755")?;
    for (path, metadata) in &nodes {
        make_node(path, metadata)?;
    }
    for dir in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        fs::create_dir_all(dir).with_context(|| format!("make {dir}"))?;
    }
    mount_fs("devpts", "/dev/pts", c"newinstance,ptmxmode=0666,mode=620")?;
    mount_fs("tmpfs", "/dev/shm", c"mode=1777")?;
    mount_fs("mqueue", "/dev/mqueue", c"")?;
    for (link, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, Path::new("/dev").join(link)).with_context(|| format!("link {link}"))?;
    }
    for disk in &spec.disks {
        if let Some(device) = &disk.device {
            link_disk(&disk.serial, device)?;
        }
    }
    Ok(())
}

fn make_node(path: &Path, metadata: &fs::Metadata) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    let kind = if metadata.file_type().is_block_device() {
        FileType::BlockDevice
    } else {
        FileType::CharacterDevice
    };
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), metadata.rdev())
        .with_context(|| format!("make {}", path.display()))?;
    // mknod applies the umask; chmod does not.
    fs::set_permissions(path, fs::Permissions::from_mode(metadata.mode() & 0o777))
        .with_context(|| format!("set the mode of {}", path.display()))
}
