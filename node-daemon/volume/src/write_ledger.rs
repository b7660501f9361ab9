//! Which metadata writes of this node may still land, in a file that the next process of this boot reads.
//!
//! Every write of the coordinator thread (Paxos and leader blocks, metadata areas) goes through
//! [`RecordedStore`], which names the part of the slot in the file before the write begins, and removes
//! it when it was written and flushed. What an error leaves there is not written again in this boot
//! ([`bascule_volume_protocol::OutstandingWrites`]); after a reboot the file says nothing.
//!
//! # What a killed process leaves
//! The parts whose writes were under way. The next process waits until no request of the dead one is in
//! flight ([`crate::writer_lock`]), then for the settle time before it is a candidate. Without that proof
//! they count as failed.
//!
//! # Assumes
//! The file need not survive the kernel, so it is not flushed; on a tmpfs it costs some microseconds a
//! write. A file that is empty was cut off by a reset.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bascule_types::{BootTime, Lba, SlotId, VmUid, VolumeId};
use bascule_volume_format::{BlockStore, SlotPart, Superblock};
use bascule_volume_protocol::{OutstandingWrites, Part, Predecessor, Rules, WriterId};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::block_device::{Identity, SharedDevice};
use crate::writer_lock::WriterLock;

/// The file, as one process keeps it.
#[derive(Debug)]
pub struct WriteLedger {
    path: PathBuf,
    boot: String,
    process: (u32, u64),
    /// The device that is written to.
    device: Box<dyn SharedDevice>,
    outstanding: OutstandingWrites,
    quiet_since: BootTime,
}

/// What a process knows when it opens its ledger.
#[derive(Debug)]
pub struct LedgerParts<'a> {
    /// The directory of the file.
    pub directory: &'a Path,
    /// The volume that is written to.
    pub volume: VolumeId,
    /// The boot id of the kernel.
    pub boot: [u8; 16],
    /// `CLOCK_BOOTTIME`.
    pub now: BootTime,
    /// The process id and start time of this process, on whose byte it has locked the device.
    pub process: (u32, u64),
    /// The device that is written to.
    pub device: Box<dyn SharedDevice>,
    /// All of them; tests break one at a time.
    pub rules: Rules,
}

/// The contents of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The boot id of the kernel, as hexadecimal digits.
    boot: String,
    /// The process that wrote the file: process id, and start time in clock ticks after boot.
    process: (u32, u64),
    /// The device that it wrote to, as [`Identity`] is printed.
    device: String,
    /// Parts with a write under way.
    submitted: BTreeSet<Part>,
    /// Parts with a failed write.
    failed: BTreeSet<Part>,
}

impl WriteLedger {
    /// Reads what earlier processes of this boot left. Only one process of a volume may have it open: the
    /// one that has locked the gate page.
    ///
    /// # Errors
    /// `WouldBlock` while a request of an earlier process is in flight; `InvalidData` when the file is not
    /// one of these; the system's.
    pub fn open(parts: LedgerParts<'_>) -> io::Result<Self> {
        fs::create_dir_all(parts.directory)?;
        let file = format!("coordinator-writes-{}.json", parts.volume);
        let mut ledger = Self {
            path: parts.directory.join(file),
            boot: format!("{:032x}", u128::from_be_bytes(parts.boot)),
            process: parts.process,
            device: parts.device,
            outstanding: OutstandingWrites::default(),
            quiet_since: BootTime(0),
        };
        let Some(record) = ledger.read()? else {
            return Ok(ledger);
        };
        let predecessor = if record.boot == ledger.boot {
            predecessor(&record, ledger.device.as_ref())?
        } else {
            Predecessor::OfEarlierBoot
        };
        let outstanding = OutstandingWrites::new(record.submitted, record.failed);
        ledger.outstanding = outstanding.inherit(parts.rules, predecessor);
        if !ledger.outstanding.submitted().is_empty() {
            ledger.quiet_since = parts.now;
        }
        if !ledger.outstanding.failed().is_empty() {
            let failed = ledger.outstanding.failed();
            tracing::warn!(
                ?failed,
                "metadata writes failed since this node booted and may still land: this node does not \
                 write these blocks again before it was restarted"
            );
        }
        ledger.save()?;
        Ok(ledger)
    }

    fn read(&self) -> io::Result<Option<Record>> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if bytes.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            let path = self.path.display();
            let what =
                format!("{path}: {error}; if this node was restarted since, remove the file");
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }

    /// The parts of `slot` that this node must not write before it was restarted.
    #[must_use]
    pub fn barred(&self, slot: SlotId) -> BTreeSet<SlotPart> {
        self.outstanding.barred(slot)
    }

    /// Since when no request of an earlier process is in flight. A candidate waits for the settle time
    /// after it; `BootTime(0)` if the last process was between two writes when it ended.
    #[must_use]
    pub const fn quiet_since(&self) -> BootTime {
        self.quiet_since
    }

    /// The settle time after [`WriteLedger::quiet_since`] has passed.
    ///
    /// # Errors
    /// The system's; the next process then waits once more.
    pub fn settle(&mut self) -> io::Result<()> {
        self.step(OutstandingWrites::settle)
    }

    fn step(&mut self, step: impl FnOnce(&mut OutstandingWrites)) -> io::Result<()> {
        let before = self.outstanding.clone();
        step(&mut self.outstanding);
        if self.outstanding == before {
            return Ok(());
        }
        self.save()
    }

    fn save(&self) -> io::Result<()> {
        let record = Record {
            boot: self.boot.clone(),
            process: self.process,
            device: self.device.identity().to_string(),
            submitted: self.outstanding.submitted().clone(),
            failed: self.outstanding.failed().clone(),
        };
        // Not half written: a record that is there is whole.
        let part = self.path.with_extension("part");
        fs::write(&part, serde_json::to_vec(&record)?)?;
        fs::rename(part, &self.path)
    }
}

/// What became of the requests of the process that wrote `record`, in this boot.
fn predecessor(record: &Record, device: &dyn SharedDevice) -> io::Result<Predecessor> {
    let (pid, started) = record.process;
    let writer = WriterId {
        vm: NO_VM,
        pid,
        started,
    };
    if record.submitted.is_empty() {
        return Ok(Predecessor::Complete);
    }
    let handed: Vec<Identity> = Identity::parse(&record.device).into_iter().collect();
    match device.writer_lock(writer, &handed) {
        WriterLock::Free => Ok(Predecessor::Complete),
        WriterLock::NoProof => Ok(Predecessor::Unproved),
        WriterLock::Held => {
            let what = format!("metadata writes of process {pid} are still in flight");
            Err(io::Error::new(io::ErrorKind::WouldBlock, what))
        }
    }
}

/// The device as the coordinator thread uses it: every write of this node's election blocks and areas is
/// in the ledger until it is flushed.
#[derive(Debug)]
pub struct RecordedStore<S> {
    store: S,
    superblock: Superblock,
    ledger: WriteLedger,
}

impl<S: BlockStore> RecordedStore<S> {
    /// Writes through `store`.
    #[must_use]
    pub const fn new(store: S, superblock: Superblock, ledger: WriteLedger) -> Self {
        Self {
            store,
            superblock,
            ledger,
        }
    }

    /// What is recorded.
    #[must_use]
    pub const fn ledger(&self) -> &WriteLedger {
        &self.ledger
    }

    /// As [`WriteLedger::settle`].
    pub fn settle(&mut self) {
        if let Err(error) = self.ledger.settle() {
            tracing::warn!(%error, "cannot record that writes of an earlier process have settled");
        }
    }

    fn note(&mut self, step: impl FnOnce(&mut OutstandingWrites)) {
        if let Err(error) = self.ledger.step(step) {
            // The next write is recorded, or refused, together with this.
            tracing::error!(%error, "cannot record how a metadata write ended");
        }
    }
}

impl<S: BlockStore> BlockStore for RecordedStore<S> {
    fn blocks(&mut self) -> io::Result<u64> {
        self.store.blocks()
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.store.read(lba, blocks)
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        let Some(part) = self.superblock.slot_part(lba) else {
            return self.store.write(lba, blocks);
        };
        if self.ledger.outstanding.failed().contains(&part) {
            let what = format!("a failed write may still land in {part:?}");
            return Err(io::Error::other(what));
        }
        self.ledger.step(|writes| writes.submit(part))?;
        let written = self.store.write(lba, blocks);
        match &written {
            Ok(()) => {}
            Err(error) if submitted_nothing(error) => self.note(|writes| writes.withdraw(part)),
            Err(_) => self.note(OutstandingWrites::fail),
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.store.flush();
        match &flushed {
            Ok(()) => self.note(OutstandingWrites::end),
            Err(_) => self.note(OutstandingWrites::fail),
        }
        flushed
    }
}

/// Whether `pwrite(2)` fails with this error before it submits anything. Of a request that was split, what
/// was submitted before is complete when the call returns.
fn submitted_nothing(error: &io::Error) -> bool {
    let before = [
        Errno::BADF,
        Errno::FAULT,
        Errno::FBIG,
        Errno::INVAL,
        Errno::NXIO,
    ];
    let errno = error.raw_os_error();
    errno.is_some_and(|errno| before.iter().any(|known| known.raw_os_error() == errno))
}

/// The coordinator writes for no VM.
const NO_VM: VmUid = VmUid::from_bytes([0; 16]);

#[cfg(test)]
mod tests;
