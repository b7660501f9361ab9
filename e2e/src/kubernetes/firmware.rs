//! A virtual machine that boots the emulated tier's guest from a disk, through UEFI firmware and GRUB.

use anyhow::{Context, Result};
use bascule_lab::guest_disk::DISK_SIZE;

use super::{ClusterVm, Installation, address};

impl Installation {
    /// As [`Self::vm`], booted by firmware. Its first disk is empty, and firmware goes on to the second one.
    ///
    /// # Errors
    /// As [`Self::vm`], and when the disk cannot be made.
    pub fn firmware_vm(&self, name: &str, number: u8) -> Result<ClusterVm<'_>> {
        let cmdline = format!(
            "console=ttyS0 guest.ip={}/24 guest.tick_ms=100",
            address(number)
        );
        let published = format!("{name}-disk");
        let disk = self.lab.publish_guest_disk(&published, &cmdline)?;
        let document = self.document(name, number);
        let (before, rest) = document.split_once("  boot:\n").context("no boot")?;
        let (_, after) = rest.split_once("  cloudInit:").context("no cloudInit")?;
        let (disks, after) = after.split_once("  interfaces:").context("no interfaces")?;
        let document = format!(
            "{before}  cloudInit:{disks}  - {{name: system, size: {DISK_SIZE}, deletionPolicy: Delete, \
             source: {{http: {{url: \"{}\", sha256: {}}}}}}}\n  interfaces:{after}",
            disk.url, disk.sha256
        );
        self.start(&document, self.handle(name, number))
    }
}
