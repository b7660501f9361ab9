//! A VM's process as the volume sees it: it opens the VM, and writes numbered blocks through the real disk engine,
//! gate and writer page. And the oracle that watches every one of its writes land.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bascule_ipc::volume::{OpenedVm, Request, Response};
use bascule_types::{Bytes, ExtentRun, Ownership, VmUid};
use bascule_volume_format::{BLOCK_BYTES, BLOCK_BYTES_U64};
use bascule_volume_gate::{GateReader, WriterPage};

use crate::guest_disk::GuestDisk;
use crate::profile::Moment;
use crate::world::World;

/// What a guest writes: which write of which process of which epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp {
    pub(crate) vm: u64,
    pub(crate) epoch: u64,
    /// In the order in which the processes were started.
    pub(crate) process: u64,
    /// Counts on over all processes of the VM.
    pub(crate) sequence: u64,
}

impl Stamp {
    fn block(self) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        let words = [MAGIC, self.vm, self.epoch, self.process, self.sequence];
        for (at, word) in block.chunks_exact_mut(8).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        block
    }

    pub(crate) fn read(block: &[u8]) -> Option<Self> {
        let word = |n: usize| {
            let bytes = block.get(n * 8..n * 8 + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        (word(0)? == MAGIC).then_some(Self {
            vm: word(1)?,
            epoch: word(2)?,
            process: word(3)?,
            sequence: word(4)?,
        })
    }
}

/// Knows every acknowledged write, and the last writer of each VM.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    acknowledged: BTreeMap<u64, Stamp>,
    writer: BTreeMap<u64, (u64, u64)>,
    pub(crate) writes: BTreeMap<u64, u64>,
    pub(crate) processes: u64,
}

impl Oracle {
    /// I1 and I3: nobody writes after a later epoch has, within an epoch one process writes, and no acknowledged block goes back.
    pub(crate) fn landed(&mut self, lba: u64, stamp: Stamp) {
        let writer = self.writer.entry(stamp.vm).or_default();
        let by = (stamp.epoch, stamp.process);
        assert!(
            by == *writer || stamp.epoch > writer.0,
            "I1: {stamp:?} took effect after the first write of epoch {} by process {}",
            writer.0,
            writer.1
        );
        *writer = by;
        if let Some(acknowledged) = self.acknowledged.get(&lba) {
            assert!(
                stamp.sequence >= acknowledged.sequence,
                "I3: {stamp:?} replaced the acknowledged {acknowledged:?}"
            );
        }
    }

    fn acknowledge(&mut self, lba: u64, stamp: Stamp) {
        self.acknowledged.insert(lba, stamp);
        *self.writes.entry(stamp.vm).or_default() += 1;
    }

    /// I3: what a guest reads when it starts.
    fn read(&self, lba: u64, found: Option<Stamp>) {
        if let Some(acknowledged) = self.acknowledged.get(&lba) {
            assert!(
                found.is_some_and(|found| found.sequence >= acknowledged.sequence),
                "I3: {found:?} was read where {acknowledged:?} was acknowledged"
            );
        }
    }
}

/// One process, from its start to its end; it is killed from outside.
pub(crate) struct Guest {
    pub(crate) world: Arc<World>,
    pub(crate) node: u8,
    pub(crate) pid: u32,
    pub(crate) vm: VmUid,
    pub(crate) number: u64,
    pub(crate) ownership: Ownership,
}

/// What the volume's process passed on.
pub(crate) struct Opened {
    pub(crate) device: OwnedFd,
    pub(crate) gate: Arc<GateReader>,
    pub(crate) page: WriterPage,
    pub(crate) extents: Vec<ExtentRun>,
    pub(crate) size: Bytes,
    pub(crate) settle: Duration,
}

impl Opened {
    /// The block of the volume where a block of the disk lies.
    fn lba(&self, block: u64) -> u64 {
        self.extents[0].start.0 + block
    }
}

impl Guest {
    pub(crate) fn run(mut self) {
        self.world.set_busy(self.node, self.pid, true);
        let opened = self.open();
        self.world.set_busy(self.node, self.pid, false);
        let Some(opened) = opened else {
            return;
        };
        let first = opened.lba(0);
        let owner = self.ownership.owner;
        let mut disk = GuestDisk::new(&self.world, self.node, self.pid, opened, owner);
        let process = {
            let mut oracle = self.world.oracle();
            oracle.processes += 1;
            oracle.processes
        };
        let mut sequence = self.read_all(&mut disk, first);
        loop {
            let pause = self.world.scheduler.below(150);
            self.world.scheduler.sleep(Duration::from_millis(pause));
            sequence += 1;
            let block = sequence % BLOCKS;
            let stamp = Stamp {
                vm: self.number,
                epoch: self.ownership.epoch.0,
                process,
                sequence,
            };
            if !self.write(&mut disk, (first, block), stamp) {
                // Like a file system that has gone read-only: a block whose write failed is not written
                // again by the guest that was told so.
                self.world.scheduler.sleep(FOR_EVER);
            }
        }
    }

    fn open(&self) -> Option<Opened> {
        let request = Request::OpenVm {
            vm: self.vm,
            owner: self.ownership.owner,
            epoch: self.ownership.epoch,
            pid: self.pid,
        };
        for _ in 0..TRIES {
            self.world.reached(Moment::Opening, self.node);
            if let Some((Response::Opened(opened), fds)) =
                self.world.call_volume(self.node, self.pid, &request)
            {
                return Some(opened_parts(opened, fds));
            }
            self.world.scheduler.sleep(Duration::from_millis(500));
        }
        None
    }

    fn read_all(&self, disk: &mut GuestDisk, first: u64) -> u64 {
        let mut last = 0;
        for block in 0..BLOCKS {
            let read = disk.read(block).expect("a guest sees no lost path");
            let found = Stamp::read(&read);
            self.world.oracle().read(first + block, found);
            last = last.max(found.map_or(0, |stamp| stamp.sequence));
        }
        last
    }

    /// The node may have joined the volume in a new generation, and kept the VM.
    fn reopen(&mut self, disk: &GuestDisk) {
        let volume = self.world.nodes()[usize::from(self.node)].volume.clone();
        let joined = volume.and_then(|volume| volume.state().joined);
        let Some(owner) = joined.filter(|joined| *joined != self.ownership.owner) else {
            return;
        };
        let request = Request::OpenVm {
            vm: self.vm,
            owner,
            epoch: self.ownership.epoch,
            pid: self.pid,
        };
        let answer = self.world.call_volume(self.node, self.pid, &request);
        if let Some((Response::Opened(_), _)) = answer {
            self.ownership.owner = owner;
            disk.set_owner(owner);
        }
    }

    /// Whether it succeeded.
    fn write(&mut self, disk: &mut GuestDisk, (first, block): (u64, u64), stamp: Stamp) -> bool {
        let written = disk.write(block, &stamp.block(), &mut |disk| self.reopen(disk));
        if let Some(what) = disk.take_failure() {
            let report = Request::ReportFailure { vm: self.vm, what };
            drop(self.world.call_volume(self.node, self.pid, &report));
        }
        if written.is_ok() {
            self.world.oracle().acknowledge(first + block, stamp);
        }
        written.is_ok()
    }
}

fn opened_parts(opened: OpenedVm, fds: Vec<OwnedFd>) -> Opened {
    let mut fds = fds.into_iter();
    let mut next = || fds.next().expect("a descriptor");
    let device = next();
    let gate = GateReader::from_fd(next()).expect("the gate page");
    let page = WriterPage::attach(next()).expect("the writer page");
    let vm = Some(opened.row.vm);
    let disk = opened.disks.into_iter().find(|disk| disk.vm == vm);
    let disk = disk.expect("a disk");
    assert!(disk.extents[0].length.0 >= BLOCKS * BLOCK_BYTES_U64);
    Opened {
        device,
        gate: Arc::new(gate),
        page,
        extents: disk.extents,
        size: disk.size,
        settle: Duration::from_millis(opened.settle_ms.expect("the settle time")),
    }
}

const MAGIC: u64 = 0x6775_6573_7421_2121;
/// Blocks that a guest writes in turn: few, so that late writes meet later ones.
const BLOCKS: u64 = 3;
const TRIES: u32 = 20;
const FOR_EVER: Duration = Duration::from_secs(1 << 20);
