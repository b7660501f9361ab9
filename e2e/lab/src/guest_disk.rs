//! A disk from which the lab's guest boots by UEFI, as a distribution publishes it, a compressed qcow2 image: a GPT
//! with an EFI system partition, Debian's GRUB at the place where firmware looks on any disk, and the guest's
//! kernel and initramfs, with a configuration of GRUB that has their command line.

use std::path::Path;

use anyhow::{Context, Result};

use crate::command::Run;
use crate::guest::GuestImage;
use crate::lab::Lab;
use crate::web::Source;

impl Lab {
    /// Publishes such a disk, [`DISK_SIZE`] long, as `name` on the web server.
    pub fn publish_guest_disk(&self, name: &str, cmdline: &str) -> Result<Source> {
        let image = GuestImage::ensure()?;
        let staging = tempfile::tempdir().context("make a directory")?;
        build(staging.path(), &image, cmdline)?;
        self.publish(name, &staging.path().join("disk.qcow2"))
    }
}

/// Its size, as a VirtualMachine has it.
pub const DISK_SIZE: &str = "96Mi";

fn build(dir: &Path, image: &GuestImage, cmdline: &str) -> Result<()> {
    Run::new("sh")
        .args(["-ec", SCRIPT, "sh"])
        .arg(&image.kernel)
        .arg(&image.initrd)
        .arg(cmdline)
        .dir(dir)
        .done()
}

/// The loader reads the configuration beside it, as Debian's does.
const SCRIPT: &str = r#"
echo 'configfile $cmdpath/grub.cfg' >early.cfg
grub-mkimage --format=x86_64-efi --prefix=/EFI/BOOT --config=early.cfg --output=bootx64.efi \
    normal configfile linux fat part_gpt serial terminal
cat >grub.cfg <<END
serial --unit=0 --speed=115200
terminal_output serial
linux (\$root)/vmlinuz $3
initrd (\$root)/initrd
boot
END
truncate -s 94M esp
mkfs.vfat -F 32 -n ESP esp >/dev/null
mmd -i esp ::/EFI ::/EFI/BOOT
mcopy -i esp bootx64.efi ::/EFI/BOOT/BOOTX64.EFI
mcopy -i esp grub.cfg ::/EFI/BOOT/grub.cfg
mcopy -i esp "$1" ::/vmlinuz
mcopy -i esp "$2" ::/initrd
truncate -s 96M disk
printf 'label: gpt\nstart=2048, size=192512, type=U\n' | sfdisk -q disk
dd if=esp of=disk bs=1M seek=1 conv=notrunc status=none
qemu-img convert -c -O qcow2 disk disk.qcow2
"#;
