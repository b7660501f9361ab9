//! Ownership as recorded on the shared volume, read directly from its disk, and the audit of which
//! node wrote where.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use bascule_lab::SanWrite;
use bascule_lab::audit::DiskWrite;
use bascule_types::{DiskRow, Epoch, ExtentRun, Lba, SlotId, VmRow};
use bascule_volume_format::{BLOCK_BYTES_U64, BlockStore, Metadata, Severity, check_volume};

use super::{ClusterVm, Installation, NAMESPACE, SAN_VOLUME};

/// The last write of one owner to a disk and the first of the next.
#[derive(Clone, Copy, Debug)]
pub struct Succession {
    /// The old owner's last write.
    pub last: SystemTime,
    /// The new owner's first.
    pub first: SystemTime,
}

/// A write to a guest's disk.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct GuestWrite {
    pub node: String,
    /// When the storage had it.
    pub begun: SystemTime,
    /// When it had taken effect; for a write whose end is not recorded, when it began.
    pub ended: SystemTime,
}

impl GuestWrite {
    fn from_san(write: SanWrite) -> Self {
        Self {
            node: write.node,
            begun: write.received,
            ended: write.landed,
        }
    }

    fn from_disk(write: DiskWrite) -> Self {
        Self {
            node: write.node,
            begun: write.at,
            ended: write.at,
        }
    }
}

impl Installation {
    /// A volume's metadata, read with the offline checker.
    ///
    /// # Errors
    /// When the checker finds damage, or a coordinator is writing at the same time.
    pub fn metadata(&self, volume: &str) -> Result<Metadata> {
        let path = match volume {
            SAN_VOLUME => self.lab.san_disk(),
            _ => self.lab.shared_disk(),
        };
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
        let writes = self.writes(since)?;
        let of_old = writes.iter().filter(|write| write.node == old);
        let of_new = writes.iter().filter(|write| write.node == new);
        let last = of_old.map(|write| write.ended).max();
        let last = last.with_context(|| format!("the old node {old} wrote nothing"))?;
        let first = of_new.map(|write| write.begun).min();
        let first = first.with_context(|| format!("the new node {new} wrote nothing"))?;
        ensure!(
            last < first,
            "the old owner wrote {:?} after the new one's first write",
            last.duration_since(first).unwrap_or_default()
        );
        Ok(Succession { last, first })
    }

    /// The writes to its disk after `since`, by the audit of its volume's storage.
    ///
    /// # Errors
    /// When there is no audit, or no disk.
    pub fn writes(&self, since: SystemTime) -> Result<Vec<GuestWrite>> {
        let disk = self.disk()?;
        let on_disk = |offset: u64, bytes: u64| overlaps(&disk, offset, bytes);
        if self.volume == SAN_VOLUME {
            let writes = self.cluster.lab.san_writes(since)?.into_iter();
            let writes = writes.filter(|write| on_disk(write.offset, write.bytes));
            return Ok(writes.map(GuestWrite::from_san).collect());
        }
        let writes = self.cluster.lab.disk_writes(since)?.into_iter();
        let writes = writes.filter(|write| on_disk(write.offset, write.bytes));
        Ok(writes.map(GuestWrite::from_disk).collect())
    }

    /// Where its disk is on the volume: ranges of bytes, first and end, in order.
    ///
    /// # Errors
    /// When it has none.
    pub fn ranges(&self) -> Result<Vec<(u64, u64)>> {
        let disk = self.disk()?;
        let mut ranges: Vec<_> = disk.extents.iter().map(range).collect();
        ranges.sort_unstable();
        Ok(ranges)
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
            || self.cluster.metadata(self.volume),
        )
    }
}

fn overlaps(disk: &DiskRow, offset: u64, bytes: u64) -> bool {
    let mut ranges = disk.extents.iter().map(range);
    ranges.any(|(first, end)| offset < end && first < offset + bytes)
}

/// First byte and end.
fn range(run: &ExtentRun) -> (u64, u64) {
    let first = run.start.0 * BLOCK_BYTES_U64;
    (first, first + run.length.0)
}

/// The disk's file, which running machines write.
struct ReadOnly(File);

impl BlockStore for ReadOnly {
    fn blocks(&mut self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len() / BLOCK_BYTES_U64)
    }

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
    use bascule_types::{Bytes, DiskId, DiskRole, RowName};

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
