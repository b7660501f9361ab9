//! Ownership as recorded on the shared volume, read directly from its disk, and the audit of which
//! node wrote where.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use bascule_types::{DiskRow, Epoch, Lba, SlotId, VmRow};
use bascule_volume_format::{BLOCK_BYTES_U64, BlockStore, Metadata, Severity, check_volume};

use super::{ClusterVm, Installation, NAMESPACE};

/// The last write of one owner to a disk and the first of the next.
#[derive(Clone, Copy, Debug)]
pub struct Succession {
    /// The old owner's last write.
    pub last: SystemTime,
    /// The new owner's first.
    pub first: SystemTime,
}

impl Installation {
    /// The shared volume's metadata, read with the offline checker.
    ///
    /// # Errors
    /// When the checker finds damage, or a coordinator is writing at the same time.
    pub fn metadata(&self) -> Result<Metadata> {
        let path = self.lab.shared_disk();
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let report = check_volume(&mut ReadOnly(file)).context("read the volume")?;
        ensure!(
            report.worst() != Some(Severity::Error),
            "the volume is damaged: {:?}",
            report.findings
        );
        let recovered = report.recovered.context("the volume has no metadata")?;
        Ok(recovered.metadata)
    }
}

impl ClusterVm<'_> {
    /// Its record on the volume.
    ///
    /// # Errors
    /// When there is none.
    pub fn row(&self) -> Result<VmRow> {
        let metadata = self.metadata()?;
        let name = format!("{NAMESPACE}/{}", self.name);
        let row = metadata.vms().find(|row| row.name.as_str() == name);
        row.cloned()
            .with_context(|| format!("the volume has no record of {name}"))
    }

    /// Slot of its owner and epoch, from the volume. Without the generation: a node that was frozen
    /// for longer than its lease rejoins with the next generation and keeps what was not taken over.
    ///
    /// # Errors
    /// When it has no owner.
    pub fn slot_and_epoch(&self) -> Result<(SlotId, Epoch)> {
        let row = self.row()?;
        let owner = row.owner.context("the VM has no owner")?;
        Ok((owner.slot, row.epoch))
    }

    /// Audits its disk: after `since`, `old` wrote to it, then `new` did, and nothing of `old` came
    /// after the first of `new`.
    ///
    /// # Errors
    /// When one of them wrote nothing, or they overlap: two writers.
    pub fn succession(&self, since: SystemTime, old: &str, new: &str) -> Result<Succession> {
        let disk = self.disk()?;
        let writes = self.cluster.lab.disk_writes(since)?;
        let on_disk = writes
            .iter()
            .filter(|write| overlaps(&disk, write.offset, write.bytes));
        let of = |node: &'static str, wanted: &str| {
            let found = on_disk.clone().filter(|write| write.node == wanted);
            let times: Vec<SystemTime> = found.map(|write| write.at).collect();
            ensure!(!times.is_empty(), "the {node} node {wanted} wrote nothing");
            Ok(times)
        };
        let (old, new) = (of("old", old)?, of("new", new)?);
        let last = old.into_iter().max().context("no write")?;
        let first = new.into_iter().min().context("no write")?;
        ensure!(
            last < first,
            "the old owner wrote {:?} after the new one's first write",
            last.duration_since(first).unwrap_or_default()
        );
        Ok(Succession { last, first })
    }

    fn disk(&self) -> Result<DiskRow> {
        let row = self.row()?;
        let metadata = self.metadata()?;
        let data = metadata
            .disks()
            .find(|disk| disk.vm == Some(row.vm) && disk.name.as_str().ends_with(".data"));
        data.cloned()
            .with_context(|| format!("{} has no disk on the volume", self.name))
    }

    /// Read again while a coordinator is in the middle of writing.
    fn metadata(&self) -> Result<Metadata> {
        bascule_lab::wait_for(
            "consistent metadata on the volume",
            super::ROWS_LIMIT,
            || self.cluster.metadata(),
        )
    }
}

fn overlaps(disk: &DiskRow, offset: u64, bytes: u64) -> bool {
    disk.extents.iter().any(|run| {
        let start = run.start.0 * BLOCK_BYTES_U64;
        offset < start + run.length.0 && start < offset + bytes
    })
}

/// The disk's file, which running machines write.
struct ReadOnly(File);

impl BlockStore for ReadOnly {
    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(blocks, lba.0 * BLOCK_BYTES_U64)
    }

    fn write(&mut self, _: Lba, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bascule_types::{Bytes, DiskId, DiskRole, ExtentRun, RowName};

    use super::*;

    #[test]
    fn a_write_belongs_to_a_disk_when_it_touches_an_extent_of_it() {
        let run = ExtentRun {
            start: Lba(256),
            length: Bytes::mib(1),
        };
        let disk = DiskRow {
            disk: DiskId::random(),
            name: RowName::new("default/web.data").unwrap(),
            vm: None,
            size: Bytes::mib(1),
            role: DiskRole::Data,
            importing: false,
            importer: None,
            extents: vec![run],
        };
        let mib = 1 << 20;
        assert!(overlaps(&disk, mib, 4096));
        assert!(overlaps(&disk, mib - 4096, 8192));
        assert!(overlaps(&disk, 2 * mib - 1, 1));
        assert!(!overlaps(&disk, 2 * mib, 4096));
        assert!(!overlaps(&disk, mib - 4096, 4096));
    }
}
