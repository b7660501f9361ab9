//! Kernel and initrd: from files, or from the home volume's extents.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use bascule_image::KERNEL_BYTES_MAX;
use bascule_ipc::vm::{Boot, ImageSource};
use bascule_types::{AlignedBuffer, DiskRow, ExtentRun};

use super::home_volume::{self, Opened};
use crate::boot::{BootSource, Initrd, OpenImages};

/// Bytes read from a volume at once.
const READ_BYTES: usize = 1 << 20;
/// Direct I/O wants memory, offset and length aligned to a volume block.
const ALIGNMENT: usize = 4096;
/// Longest firmware in bytes: edk2's CloudHv has 4 MiB.
const FIRMWARE_BYTES_MAX: u64 = 16 << 20;

/// Opens the kernel and initrd that `boot` names, in files or on the home volume `opened`, whose device stays
/// open for it. The volume deletes no disk of a VM that has an owner. Firmware is read at once: its file
/// belongs to the release of this process, and a reset may come long after that was removed.
pub(super) fn opener(boot: &Boot, opened: Option<&Opened>) -> anyhow::Result<OpenImages> {
    if let ImageSource::Firmware { path } = &boot.kernel {
        let firmware = firmware(path)?;
        return Ok(Box::new(move || {
            Ok(BootSource {
                kernel: firmware.clone(),
                initrd: None,
                cmdline: String::new(),
            })
        }));
    }
    let boot = boot.clone();
    let home = opened.map(|opened| BootDisks {
        device: Arc::clone(&opened.device),
        rows: opened.disks.clone(),
    });
    Ok(Box::new(move || {
        open(&boot, home.as_ref()).map_err(Into::into)
    }))
}

fn firmware(path: &Path) -> anyhow::Result<Vec<u8>> {
    let shown = path.display();
    let file = File::open(path).with_context(|| {
        format!(
            "boot.firmware: open {shown}: this build of Bascule has no firmware (make firmware)"
        )
    })?;
    let mut firmware = Vec::new();
    file.take(FIRMWARE_BYTES_MAX)
        .read_to_end(&mut firmware)
        .with_context(|| format!("boot.firmware: read {shown}"))?;
    ensure!(
        firmware.starts_with(b"\x7fELF"),
        "boot.firmware: {shown} is not an ELF file"
    );
    Ok(firmware)
}

/// The home volume as far as boot images need it.
struct BootDisks {
    device: Arc<File>,
    rows: Vec<DiskRow>,
}

fn open(boot: &Boot, opened: Option<&BootDisks>) -> anyhow::Result<BootSource> {
    let (length, mut content) = image(&boot.kernel, opened).context("boot.kernel")?;
    ensure!(
        length <= KERNEL_BYTES_MAX,
        "boot.kernel: {length} bytes are too long for a kernel"
    );
    let mut kernel = Vec::with_capacity(usize::try_from(length)?);
    content
        .read_to_end(&mut kernel)
        .context("boot.kernel: cannot be read")?;
    let initrd = match &boot.initrd {
        Some(source) => {
            let (length, content) = image(source, opened).context("boot.initrd")?;
            Some(Initrd { length, content })
        }
        None => None,
    };
    Ok(BootSource {
        kernel,
        initrd,
        cmdline: boot.cmdline.clone(),
    })
}

type Image = (u64, Box<dyn Read + Send>);

fn image(source: &ImageSource, opened: Option<&BootDisks>) -> anyhow::Result<Image> {
    match source {
        ImageSource::File { path } | ImageSource::Firmware { path } => {
            let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            let length = file.metadata()?.len();
            Ok((length, Box::new(file)))
        }
        ImageSource::Volume { disk } => {
            let Some(opened) = opened else {
                bail!("{disk:?} is on a volume, but there is none");
            };
            let row = home_volume::disk(&opened.rows, disk)?;
            let reader = ExtentReader::new(Arc::clone(&opened.device), row)?;
            Ok((row.size.0, Box::new(reader)))
        }
    }
}

/// Reads the extents of a disk in order, with direct I/O.
struct ExtentReader {
    device: Arc<File>,
    extents: std::vec::IntoIter<ExtentRun>,
    /// The rest of the present run: offset on the device and length, in bytes.
    run: (u64, u64),
    /// Bytes of the image that were not yet read.
    left: u64,
    /// [`READ_BYTES`] of memory; the part of it that is filled and not yet returned.
    buffer: AlignedBuffer,
    filled: std::ops::Range<usize>,
}

impl ExtentReader {
    fn new(device: Arc<File>, row: &DiskRow) -> anyhow::Result<Self> {
        ensure!(!row.importing, "{} is still being imported", row.name);
        Ok(Self {
            device,
            extents: row.extents.clone().into_iter(),
            run: (0, 0),
            left: row.size.0,
            buffer: AlignedBuffer::new(READ_BYTES, ALIGNMENT),
            filled: 0..0,
        })
    }

    fn refill(&mut self) -> io::Result<()> {
        if self.run.1 == 0 {
            let next = self.extents.next().ok_or(io::ErrorKind::UnexpectedEof)?;
            let offset = next.start.lba_to_bytes().map_err(io::Error::other)?;
            self.run = (offset.0, next.length.0);
        }
        let length = usize::try_from(self.run.1)
            .unwrap_or(usize::MAX)
            .min(READ_BYTES);
        let room = self
            .buffer
            .bytes_mut()
            .get_mut(..length)
            .unwrap_or_default();
        let read =
            rustix::io::retry_on_intr(|| rustix::io::pread(&self.device, &mut *room, self.run.0))?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let advanced = u64::try_from(read).map_err(io::Error::other)?;
        self.run = (self.run.0 + advanced, self.run.1 - advanced);
        self.filled = 0..read;
        Ok(())
    }
}

impl Read for ExtentReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        if self.filled.is_empty() {
            self.refill()?;
        }
        let ready = self
            .buffer
            .bytes()
            .get(self.filled.clone())
            .unwrap_or_default();
        let count = wanted.min(ready.len());
        for (to, from) in buffer.iter_mut().zip(ready.iter().take(count)) {
            *to = *from;
        }
        self.filled.start += count;
        self.left -= u64::try_from(count).map_err(io::Error::other)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bascule_types::{Bytes, DiskId, DiskRole, Lba};
    use std::io::Write;

    fn row(size: Bytes, extents: Vec<ExtentRun>) -> DiskRow {
        DiskRow {
            disk: DiskId::random(),
            name: "default/kernel".to_owned().try_into().unwrap(),
            vm: None,
            size,
            role: DiskRole::Kernel,
            importing: false,
            importer: None,
            extents,
        }
    }

    #[test]
    fn an_image_is_read_across_scattered_extents_to_its_true_length() {
        let mut file = tempfile::tempfile().unwrap();
        for mib in 1..=4 {
            file.write_all(&vec![mib; 1 << 20]).unwrap();
        }
        let run = |start| ExtentRun {
            start: Lba(start),
            length: Bytes::mib(1),
        };
        let row = row(Bytes((1 << 20) + 5), vec![run(768), run(0)]);
        let mut reader = ExtentReader::new(Arc::new(file), &row).unwrap();
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        assert_eq!(content.len(), (1 << 20) + 5);
        assert!(content[..1 << 20].iter().all(|byte| *byte == 4));
        assert_eq!(content[1 << 20..], [1; 5]);
    }

    #[test]
    fn firmware_is_kept_for_resets_and_missing_or_broken_refused_with_its_field() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("firmware");
        let boot = Boot {
            kernel: ImageSource::Firmware { path: path.clone() },
            initrd: None,
            cmdline: String::new(),
        };
        let refused = |boot| format!("{:#}", opener(boot, None).err().unwrap());
        assert!(refused(&boot).starts_with("boot.firmware: open "));
        std::fs::write(&path, "#!/bin/sh").unwrap();
        assert!(refused(&boot).ends_with("is not an ELF file"));
        std::fs::write(&path, "\x7fELF and more").unwrap();
        let open = opener(&boot, None).unwrap();
        std::fs::remove_file(&path).unwrap();
        for _ in 0..2 {
            assert_eq!(open().unwrap().kernel, b"\x7fELF and more");
        }
    }

    #[test]
    fn a_half_imported_image_is_refused() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let row = DiskRow {
            importing: true,
            ..row(Bytes::mib(1), vec![])
        };
        let refused = ExtentReader::new(file, &row).err().unwrap();
        assert!(
            refused.to_string().contains("still being imported"),
            "{refused}"
        );
    }
}
