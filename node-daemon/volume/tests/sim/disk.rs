//! The shared disk: requests are under way for a while, wait while a path is stalled, fail, and land after
//! they failed. What is under way when its initiator is reset lands within the settle time or never.
//!
//! A completed write is durable: losing a device's cache is what `format/tests/it/crash.rs` enumerates.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::{Bytes, Lba};
use bascule_volume::block_device::{Handle, Identity, SharedDevice};
use bascule_volume::writer_lock::WriterLock;
use bascule_volume_format::{BLOCK_BYTES, BlockStore, SlotPart, Superblock, read_leaders, recover};
use bascule_volume_protocol::WriterId;

use crate::Setup;
use crate::guest::{Oracle, Stamp};
use crate::oracles::ElectionOracle;
use crate::profile::Profile;
use crate::scheduler::{Scheduler, nanos};

/// A node in one boot.
pub(crate) type Initiator = (u8, u64);

pub(crate) struct Disk {
    scheduler: Arc<Scheduler>,
    superblock: Superblock,
    setup: Setup,
    /// One write in this many fails on a failing path.
    fails_once_in: u64,
    /// What a reset leaves under way lands at the end of the settle time.
    lands_last: bool,
    state: Mutex<DiskState>,
    /// Flushes that made writes of metadata areas durable.
    pub(crate) commits: AtomicU64,
    pub(crate) oracle: Mutex<Oracle>,
}

#[derive(Default)]
struct DiskState {
    blocks: BTreeMap<u64, Arc<[u8]>>,
    requests: BTreeMap<u64, Request>,
    next: u64,
    stalled: BTreeMap<u8, u64>,
    /// Writes of these nodes fail once in a few, until then.
    failing: BTreeMap<u8, u64>,
    /// The guests of these nodes have lost their path, until then.
    lost: BTreeMap<u8, u64>,
    /// Blocks that cannot be parsed.
    damaged: BTreeSet<u64>,
    elections: ElectionOracle,
}

struct Request {
    initiator: Initiator,
    pid: u32,
    lba: u64,
    bytes: Arc<[u8]>,
    /// When it takes effect; never if that is none.
    lands: Option<u64>,
    completes: u64,
    /// The error that it completes with.
    fails: Option<i32>,
    /// It failed at a place that fails until it has landed.
    is_stuck: bool,
    /// Somebody will ask for its outcome.
    is_awaited: bool,
}

/// What a request does.
pub(crate) enum What<'a> {
    Read,
    Write(&'a [u8]),
    /// A write of a guest's disk: one that a lost path fails lands within the settle time, as the guest's process
    /// assumes, and one that fails otherwise does when it likes, and until then every write of the block fails.
    GuestWrite(&'a [u8]),
}

impl Disk {
    pub(crate) fn new(
        scheduler: &Arc<Scheduler>,
        superblock: Superblock,
        setup: Setup,
        profile: &Profile,
    ) -> Arc<Self> {
        Arc::new(Self {
            scheduler: Arc::clone(scheduler),
            superblock,
            setup,
            fails_once_in: profile.fails_once_in,
            lands_last: profile.lands_last,
            state: Mutex::default(),
            commits: AtomicU64::new(0),
            oracle: Mutex::default(),
        })
    }

    pub(crate) fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    fn settle(&self) -> u64 {
        nanos(self.superblock.timings.settle)
    }

    /// Without delays or faults: for setting up and for the last check.
    pub(crate) fn offline(self: &Arc<Self>) -> Offline {
        Offline(Arc::clone(self))
    }

    pub(crate) fn stall(&self, node: u8, until: u64) {
        let now = self.scheduler.now();
        let mut state = self.lock();
        state.stalled.insert(node, until);
        for request in state.requests.values_mut() {
            if request.initiator.0 == node && request.completes > now {
                let late = until.saturating_sub(now);
                request.completes += late;
                request.lands = request
                    .lands
                    .map(|at| if at > now { at + late } else { at });
            }
        }
    }

    pub(crate) fn fail_writes(&self, node: u8, until: u64) {
        self.lock().failing.insert(node, until);
    }

    /// The process was killed: a write of it that fails from now on is seen by no process, and is assumed to
    /// land within the settle time (ADR 6).
    pub(crate) fn process_ended(&self, initiator: Initiator, pid: u32) {
        let settle = self.settle();
        let mut state = self.lock();
        let requests = state.requests.values_mut();
        for request in
            requests.filter(|request| (request.initiator, request.pid) == (initiator, pid))
        {
            let latest = request.completes + settle;
            request.lands = request.lands.map(|at| at.min(latest));
            request.is_awaited = false;
        }
    }

    /// Every request of the node's guests fails.
    pub(crate) fn lose_path(&self, node: u8, until: u64) {
        self.lock().lost.insert(node, until);
    }

    /// The initiator was reset: half of what it has under way is lost, the rest lands within settle.
    pub(crate) fn reset(&self, node: u8) {
        let now = self.scheduler.now();
        self.apply(now);
        let settle = self.settle();
        let mut state = self.lock();
        let ids: Vec<u64> = (state.requests.iter())
            .filter(|(_, request)| request.initiator.0 == node)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let lost = !self.lands_last && self.scheduler.once_in(2);
            let lands = match self.lands_last {
                true => now + settle - 1,
                false => now + self.scheduler.below(settle),
            };
            if let Some(request) = state.requests.get_mut(&id) {
                let later = request.lands.filter(|_| !lost);
                request.lands = later.map(|at| at.min(lands));
                request.completes = now;
                request.is_awaited = false;
            }
        }
        state.lost.remove(&node);
        state.stalled.remove(&node);
        state.failing.remove(&node);
    }

    /// Applies what has landed, in order.
    fn apply(&self, now: u64) {
        let mut state = self.lock();
        let mut landed: Vec<(u64, u64)> = (state.requests.iter())
            .filter_map(|(id, request)| Some((request.lands.filter(|at| *at <= now)?, *id)))
            .collect();
        landed.sort_unstable();
        for (_, id) in landed {
            let Some(request) = state.requests.get_mut(&id) else {
                continue;
            };
            request.lands = None;
            let (lba, bytes) = (request.lba, Arc::clone(&request.bytes));
            for (n, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
                if let Some(stamp) = Stamp::read(block) {
                    let mut oracle = self.oracle.lock().unwrap_or_else(PoisonError::into_inner);
                    oracle.landed(lba + n as u64, stamp);
                }
                state.land(&self.superblock, Lba(lba + n as u64), block);
            }
        }
        state.requests.retain(|_, request| {
            request.lands.is_some() || request.completes > now || request.is_awaited
        });
    }

    /// Submits a write and waits for its completion.
    pub(crate) fn write(
        &self,
        initiator: Initiator,
        pid: u32,
        lba: Lba,
        bytes: &[u8],
        uninterruptible: bool,
    ) -> io::Result<()> {
        let id = self.submit(initiator, pid, lba, &What::Write(bytes));
        self.await_completion(id, uninterruptible)
    }

    /// Submits a request. Its id, by which [`Disk::outcome`] must be asked for until there is one.
    pub(crate) fn submit(&self, initiator: Initiator, pid: u32, lba: Lba, what: &What<'_>) -> u64 {
        let now = self.scheduler.now();
        let took = self.latency();
        let early = self.scheduler.below(took);
        let fails_once_in = self.scheduler.below(self.fails_once_in);
        let late = self.scheduler.below(nanos(LANDS_LATE_MAX));
        let mut state = self.lock();
        let from = state
            .stalled
            .get(&initiator.0)
            .copied()
            .unwrap_or(0)
            .max(now);
        let failing = state.failing.get(&initiator.0).is_some_and(|at| *at > now);
        let (bytes, is_guest): (&[u8], bool) = match what {
            What::Read => (&[], true),
            What::Write(bytes) => (bytes, false),
            What::GuestWrite(bytes) => (bytes, true),
        };
        let is_lost = is_guest && state.lost.get(&initiator.0).is_some_and(|at| *at > now);
        let is_stuck = is_guest && !bytes.is_empty() && state.is_stuck(initiator, lba);
        let fails = if is_lost {
            Some([libc::EIO, libc::ENOLINK][usize::from(fails_once_in == 0)])
        } else {
            let fails = is_stuck || !bytes.is_empty() && failing && fails_once_in == 0;
            fails.then_some(libc::EIO)
        };
        let lands = match fails {
            None => from + early,
            Some(_) if is_lost => from + took + late.min(self.settle() - 1),
            Some(_) => from + took + late,
        };
        let id = state.next;
        state.next += 1;
        state.requests.insert(
            id,
            Request {
                initiator,
                pid,
                lba: lba.0,
                bytes: bytes.into(),
                lands: (!bytes.is_empty()).then_some(lands),
                completes: from + took,
                fails,
                is_stuck: fails.is_some() && is_guest && !is_lost,
                is_awaited: true,
            },
        );
        id
    }

    /// When the request completes, as it looks now.
    pub(crate) fn completes(&self, id: u64) -> u64 {
        let state = self.lock();
        state
            .requests
            .get(&id)
            .map_or(0, |request| request.completes)
    }

    /// The outcome of a request that has completed, once.
    pub(crate) fn outcome(&self, id: u64) -> Option<io::Result<()>> {
        let now = self.scheduler.now();
        let mut state = self.lock();
        let Some(request) = state.requests.get_mut(&id) else {
            // Of a node that was reset.
            return Some(Ok(()));
        };
        if request.completes > now {
            return None;
        }
        request.is_awaited = false;
        let fails = request.fails;
        drop(state);
        self.apply(now);
        Some(fails.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))))
    }

    fn await_completion(&self, id: u64, uninterruptible: bool) -> io::Result<()> {
        loop {
            if let Some(outcome) = self.outcome(id) {
                return outcome;
            }
            let completes = self.completes(id);
            self.scheduler.block(None, completes, uninterruptible);
        }
    }

    pub(crate) fn read(
        &self,
        initiator: Initiator,
        lba: Lba,
        blocks: &mut [u8],
        uninterruptible: bool,
    ) {
        let took = self.latency();
        let mut done = self.scheduler.now() + took;
        loop {
            self.scheduler.block(None, done, uninterruptible);
            let stalled = self.lock().stalled.get(&initiator.0).copied().unwrap_or(0);
            if stalled <= self.scheduler.now() {
                break;
            }
            done = stalled + took;
        }
        self.read_now(lba, blocks);
    }

    pub(crate) fn read_now(&self, lba: Lba, blocks: &mut [u8]) {
        self.apply(self.scheduler.now());
        let state = self.lock();
        for (n, block) in blocks.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            match state.blocks.get(&(lba.0 + n as u64)) {
                Some(found) => block.copy_from_slice(found),
                None => block.fill(0),
            }
        }
    }

    /// Mostly under 2 ms, sometimes a quarter of a second.
    fn latency(&self) -> u64 {
        let most = if self.scheduler.once_in(200) {
            250_000_000
        } else {
            2_000_000
        };
        100_000 + self.scheduler.below(most)
    }

    /// Whether the kernel has a request of this process left.
    fn is_in_flight(&self, initiator: Initiator, pid: u32) -> bool {
        let now = self.scheduler.now();
        let state = self.lock();
        let mut mine = (state.requests.values())
            .filter(|request| request.initiator == initiator && request.pid == pid);
        !self.setup.lock_lies && mine.any(|request| request.completes > now)
    }

    /// Damages a block. Unless `newest`, only if the volume can still be read: it is provably obsolete then.
    pub(crate) fn damage(self: &Arc<Self>, lba: Lba, newest: bool) {
        self.apply(self.scheduler.now());
        let Some(before) = self.lock().blocks.get(&lba.0).cloned() else {
            return;
        };
        if !self.is_readable() {
            return;
        }
        let mut damaged = before.to_vec();
        for byte in damaged.iter_mut().skip(64).take(64) {
            *byte ^= 0x5a;
        }
        {
            let mut state = self.lock();
            state.blocks.insert(lba.0, damaged.into());
            state.damaged.insert(lba.0);
        }
        if !newest && !self.is_readable() {
            let mut state = self.lock();
            state.blocks.insert(lba.0, before);
            state.damaged.remove(&lba.0);
        }
    }

    fn is_readable(self: &Arc<Self>) -> bool {
        let mut store = self.offline();
        read_leaders(&mut store, &self.superblock).is_ok()
            && recover(&mut store, &self.superblock).is_ok()
    }

    /// What a mutation does with damaged blocks of a read.
    fn misread(&self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        let state = self.lock();
        for (n, block) in blocks.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            if state.damaged.contains(&(lba.0 + n as u64)) {
                if self.setup.old_damage_counts {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                if self.setup.damages_newest {
                    block.fill(0);
                }
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, DiskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskState {
    /// A write of this block that failed has not landed.
    fn is_stuck(&self, initiator: Initiator, lba: Lba) -> bool {
        self.requests.values().any(|request| {
            let is_stuck = request.is_stuck && request.lands.is_some();
            is_stuck && request.initiator == initiator && request.lba == lba.0
        })
    }

    fn land(&mut self, superblock: &Superblock, lba: Lba, block: &[u8]) {
        let before = self.blocks.insert(lba.0, block.into());
        (self.elections).landed(superblock, lba, before.as_deref(), block);
        self.damaged.remove(&lba.0);
    }
}

/// The disk as a process of a node has it open.
#[derive(Clone)]
pub(crate) struct Attached {
    pub(crate) disk: Arc<Disk>,
    pub(crate) initiator: Initiator,
    pub(crate) pid: u32,
    /// Which processes of the node live.
    pub(crate) lives: Arc<dyn Fn(u32) -> bool + Send + Sync>,
    /// Told of every write before it is submitted.
    pub(crate) about_to_write: Arc<dyn Fn(Lba) + Send + Sync>,
    /// This handle has written to a metadata area since its last flush.
    pub(crate) has_written_area: bool,
}

impl std::fmt::Debug for Attached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Attached({:?}, {})", self.initiator, self.pid)
    }
}

impl BlockStore for Attached {
    /// Without a request: the kernel knows it.
    fn blocks(&mut self) -> io::Result<u64> {
        Ok(self.disk.superblock.blocks)
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.disk.read(self.initiator, lba, blocks, true);
        self.disk.misread(lba, blocks)
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        (self.about_to_write)(lba);
        let part = self.disk.superblock.slot_part(lba);
        self.has_written_area |= matches!(part, Some((_, SlotPart::Area(_))));
        self.disk.write(self.initiator, self.pid, lba, blocks, true)
    }

    fn flush(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.has_written_area) {
            self.disk.commits.fetch_add(1, Ordering::Relaxed);
        }
        let mut none = [];
        self.disk.read(self.initiator, Lba(0), &mut none, true);
        Ok(())
    }
}

impl SharedDevice for Attached {
    fn handle(&self) -> Handle {
        Handle(Box::new(self.clone()))
    }

    fn reopen_if(&self, accept: &mut dyn FnMut(Handle) -> bool) -> io::Result<bool> {
        Ok(accept(self.handle()))
    }

    fn check_present(&self) -> io::Result<()> {
        Ok(())
    }

    fn block_bytes(&self) -> u32 {
        4096
    }

    fn open_for(&self, _: WriterId) -> io::Result<(OwnedFd, Identity)> {
        let nothing = std::fs::File::open("/dev/null")?;
        Ok((nothing.into(), self.identity()))
    }

    fn identity(&self) -> Identity {
        Identity {
            device: 1,
            inode: 1,
            special: 0,
        }
    }

    fn writer_lock(&self, writer: WriterId, _: &[Identity]) -> WriterLock {
        let held = (self.lives)(writer.pid) || self.disk.is_in_flight(self.initiator, writer.pid);
        if held {
            WriterLock::Held
        } else {
            WriterLock::Free
        }
    }

    fn zero(&self, start: Lba, length: Bytes) -> io::Result<()> {
        let blocks = usize::try_from(length.0).unwrap_or(0) / BLOCK_BYTES;
        let zeroes = vec![0; blocks * BLOCK_BYTES];
        self.disk
            .write(self.initiator, self.pid, start, &zeroes, true)
    }
}

pub(crate) struct Offline(Arc<Disk>);

impl BlockStore for Offline {
    fn blocks(&mut self) -> io::Result<u64> {
        Ok(self.0.superblock.blocks)
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.0.read_now(lba, blocks);
        Ok(())
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        let mut state = self.0.lock();
        for (n, block) in blocks.chunks_exact(BLOCK_BYTES).enumerate() {
            state.blocks.insert(lba.0 + n as u64, block.into());
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// After an error a living initiator's write lands at any time; this is how long the simulation waits.
const LANDS_LATE_MAX: Duration = Duration::from_secs(60);
