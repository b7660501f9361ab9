//! A VM's process as the volume sees it: it opens the VM, writes numbered blocks through the gate, and keeps
//! its writer page. And the oracle that watches every one of its writes land.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bascule_ipc::volume::{Request, Response};
use bascule_types::{Lba, Ownership, VmRow, VmUid};
use bascule_volume_format::{BLOCK_BYTES, BLOCK_BYTES_U64};
use bascule_volume_gate::{GateReader, WriterPage};

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

struct Open {
    gate: GateReader,
    page: WriterPage,
    blocks: Vec<u64>,
}

impl Guest {
    pub(crate) fn run(mut self) {
        self.world.set_busy(self.node, self.pid, true);
        let opened = self.open();
        self.world.set_busy(self.node, self.pid, false);
        let Some(open) = opened else {
            return;
        };
        let process = {
            let mut oracle = self.world.oracle();
            oracle.processes += 1;
            oracle.processes
        };
        let mut sequence = self.read_all(&open);
        loop {
            let pause = self.world.scheduler.below(150);
            self.world.scheduler.sleep(Duration::from_millis(pause));
            sequence += 1;
            let lba = open.blocks[usize::try_from(sequence).unwrap_or(0) % open.blocks.len()];
            let stamp = Stamp {
                vm: self.number,
                epoch: self.ownership.epoch.0,
                process,
                sequence,
            };
            if !self.write(&open, lba, stamp) {
                // Like a file system that has gone read-only: a block whose write failed is not written
                // again by the guest that was told so.
                self.world.scheduler.sleep(FOR_EVER);
            }
        }
    }

    fn open(&self) -> Option<Open> {
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
                return Some(opened_parts(&opened.row, fds, &opened.disks));
            }
            self.world.scheduler.sleep(Duration::from_millis(500));
        }
        None
    }

    fn read_all(&self, open: &Open) -> u64 {
        let initiator = self.world.initiator(self.node);
        let mut last = 0;
        for lba in &open.blocks {
            let mut block = vec![0; BLOCK_BYTES];
            (self.world.disk).read(initiator, Lba(*lba), &mut block, false);
            let found = Stamp::read(&block);
            self.world.oracle().read(*lba, found);
            last = last.max(found.map_or(0, |stamp| stamp.sequence));
        }
        last
    }

    /// The node may have joined the volume in a new generation, and kept the VM.
    fn reopen(&mut self) {
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
        }
    }

    /// Whether it succeeded.
    fn write(&mut self, open: &Open, lba: u64, stamp: Stamp) -> bool {
        loop {
            open.page.write_begins();
            let now = self.world.node_time(self.node);
            let allowed = open.gate.check(now, self.ownership.owner).is_ok();
            if allowed {
                self.world.set_busy(self.node, self.pid, true);
                break;
            }
            open.page.writes_ended();
            self.world.scheduler.sleep(Duration::from_millis(100));
            self.reopen();
        }
        // Between the check and the submission the process may stand still for any time.
        self.world.reached(Moment::Passed, self.node);
        if self.world.is_falsely_unwatched(self.node) {
            self.world.reached(Moment::PassedUnwatched, self.node);
        }
        let stop = self.world.scheduler.below(3_000_000);
        self.world.scheduler.sleep(Duration::from_nanos(stop));
        let initiator = self.world.initiator(self.node);
        let written = (self.world.disk).write(initiator, self.pid, Lba(lba), &stamp.block(), false);
        match written {
            Ok(()) => {
                self.world.oracle().acknowledge(lba, stamp);
                open.page.writes_ended();
                self.world.set_busy(self.node, self.pid, false);
                true
            }
            Err(error) => {
                open.page.write_failed();
                open.page.writes_ended();
                let what = error.to_string();
                let report = Request::ReportFailure { vm: self.vm, what };
                drop(self.world.call_volume(self.node, self.pid, &report));
                false
            }
        }
    }
}

fn opened_parts(row: &VmRow, fds: Vec<OwnedFd>, disks: &[bascule_types::DiskRow]) -> Open {
    let mut fds = fds.into_iter().skip(1);
    let mut next = || fds.next().expect("a descriptor");
    let gate = GateReader::from_fd(next()).expect("the gate page");
    let page = WriterPage::attach(next()).expect("the writer page");
    let disk = disks.iter().find(|disk| disk.vm == Some(row.vm));
    let start = disk.expect("a disk").extents[0].start.0;
    assert!(disk.is_some_and(|disk| disk.extents[0].length.0 >= BLOCKS * BLOCK_BYTES_U64));
    Open {
        gate,
        page,
        blocks: (start..start + BLOCKS).collect(),
    }
}

const MAGIC: u64 = 0x6775_6573_7421_2121;
/// Blocks that a guest writes in turn: few, so that late writes meet later ones.
const BLOCKS: u64 = 3;
const TRIES: u32 = 20;
const FOR_EVER: Duration = Duration::from_secs(1 << 20);
