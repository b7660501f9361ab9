//! The shared disk: requests are under way for a while, wait while a path is stalled, fail, and land after
//! they failed. What is under way when its initiator is reset lands within the settle time or never.
//!
//! A completed write is durable: losing a device's cache is what `format/tests/it/crash.rs` enumerates.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::{Bytes, Lba};
use bascule_volume::block_device::{Handle, Identity, SharedDevice};
use bascule_volume::writer_lock::WriterLock;
use bascule_volume_format::{BLOCK_BYTES, BlockStore};
use bascule_volume_protocol::WriterId;

use crate::guest::{Oracle, Stamp};
use crate::scheduler::{Scheduler, nanos};

/// A node in one boot.
pub(crate) type Initiator = (u8, u64);

pub(crate) struct Disk {
    scheduler: Arc<Scheduler>,
    pub(crate) settle: Duration,
    state: Mutex<DiskState>,
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
    /// The device answers no lock question truthfully: a mutation.
    pub(crate) lock_lies: bool,
}

struct Request {
    initiator: Initiator,
    pid: u32,
    lba: u64,
    bytes: Arc<[u8]>,
    /// When it takes effect; never if that is none.
    lands: Option<u64>,
    completes: u64,
    fails: bool,
}

impl Disk {
    pub(crate) fn new(scheduler: &Arc<Scheduler>, settle: Duration, lock_lies: bool) -> Arc<Self> {
        Arc::new(Self {
            scheduler: Arc::clone(scheduler),
            settle,
            state: Mutex::new(DiskState {
                lock_lies,
                ..DiskState::default()
            }),
            oracle: Mutex::default(),
        })
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
        let settle = nanos(self.settle);
        let mut state = self.lock();
        let requests = state.requests.values_mut();
        for request in
            requests.filter(|request| (request.initiator, request.pid) == (initiator, pid))
        {
            let latest = request.completes + settle;
            request.lands = request.lands.map(|at| at.min(latest));
        }
    }

    /// The initiator was reset: half of what it has under way is lost, the rest lands within settle.
    pub(crate) fn reset(&self, node: u8) {
        let now = self.scheduler.now();
        self.apply(now);
        let settle = nanos(self.settle);
        let mut state = self.lock();
        let ids: Vec<u64> = (state.requests.iter())
            .filter(|(_, request)| request.initiator.0 == node)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let lost = self.scheduler.once_in(2);
            let lands = now + self.scheduler.below(settle);
            if let Some(request) = state.requests.get_mut(&id) {
                let later = request.lands.filter(|_| !lost);
                request.lands = later.map(|at| at.min(lands));
                request.completes = now;
            }
        }
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
                state.blocks.insert(lba + n as u64, block.into());
            }
        }
        state
            .requests
            .retain(|_, request| request.lands.is_some() || request.completes > now);
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
        let id = self.submit(initiator, pid, lba, bytes);
        let fails = self.await_completion(id, uninterruptible);
        if fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn submit(&self, initiator: Initiator, pid: u32, lba: Lba, bytes: &[u8]) -> u64 {
        let now = self.scheduler.now();
        let took = self.latency();
        let early = self.scheduler.below(took);
        let fails_once_in = self.scheduler.below(4);
        let late = self.scheduler.below(nanos(LANDS_LATE_MAX));
        let mut state = self.lock();
        let from = state
            .stalled
            .get(&initiator.0)
            .copied()
            .unwrap_or(0)
            .max(now);
        let failing = state.failing.get(&initiator.0).is_some_and(|at| *at > now);
        let fails = failing && fails_once_in == 0;
        let lands = if fails {
            from + took + late
        } else {
            from + early
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
                lands: Some(lands),
                completes: from + took,
                fails,
            },
        );
        id
    }

    /// Whether it failed.
    fn await_completion(&self, id: u64, uninterruptible: bool) -> bool {
        loop {
            let now = self.scheduler.now();
            let (completes, fails) = match self.lock().requests.get(&id) {
                Some(request) => (request.completes, request.fails),
                None => return false,
            };
            if completes <= now {
                self.apply(now);
                return fails;
            }
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

    fn read_now(&self, lba: Lba, blocks: &mut [u8]) {
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
        !state.lock_lies && mine.any(|request| request.completes > now)
    }

    fn lock(&self) -> MutexGuard<'_, DiskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
}

impl std::fmt::Debug for Attached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Attached({:?}, {})", self.initiator, self.pid)
    }
}

impl BlockStore for Attached {
    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.disk.read(self.initiator, lba, blocks, true);
        Ok(())
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        self.disk.write(self.initiator, self.pid, lba, blocks, true)
    }

    fn flush(&mut self) -> io::Result<()> {
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
