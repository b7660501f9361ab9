//! Finds an emulated node's virtio devices by the serial number or name that its machine gave them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::wait::wait_for;

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
