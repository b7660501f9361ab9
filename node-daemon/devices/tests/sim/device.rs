//! The device in memory: commands take a while, wait while it is stalled, and fail for two reasons, of which it
//! keeps the truth. A write that failed may land until the settle time has passed.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bascule_devices::disk::{DeviceCommand, SimulatedDevice, Transferred};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::gate::Gate;
use crate::oracle::{Oracle, SECTOR, Stamp, extents};

/// Which guest's disk, opened for the how manyth time.
pub(crate) type Life = (usize, u64);

/// Why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The path to the device was lost.
    Path,
    /// The device refused it.
    Medium,
    /// Nothing was done: to be submitted again.
    Transient,
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// This many bytes were transferred.
    Done(usize),
    Failed(i32, Cause),
}

#[derive(Debug)]
struct Request {
    life: Life,
    tag: u64,
    command: DeviceCommand,
    /// When a write takes effect; never if that is none.
    lands: Option<u64>,
    /// None once it has been posted.
    completes: Option<u64>,
    outcome: Outcome,
}

/// A block that cannot be read or written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bad {
    pub(crate) errno: i32,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
}

/// A command that failed, as bytes of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) guest: usize,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) at: u64,
}

#[derive(Debug)]
pub(crate) struct Device {
    start: Instant,
    pub(crate) now: u64,
    pub(crate) random: StdRng,
    bytes: Vec<u8>,
    requests: BTreeMap<u64, Request>,
    next: u64,
    posted: BTreeMap<Life, VecDeque<(u64, io::Result<Transferred>)>>,
    /// The path is lost until then.
    pub(crate) lost_until: u64,
    pub(crate) stalled_until: u64,
    /// Some writes fail until then, at good places.
    pub(crate) failing_until: u64,
    /// By their number.
    pub(crate) bad: BTreeMap<u64, Bad>,
    /// Those of [`Cause::Medium`].
    pub(crate) medium_failures: Vec<Failure>,
    /// Lives of which a write or flush failed.
    unclean: BTreeSet<Life>,
    pub(crate) oracle: Oracle,
}

impl Device {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            start: Instant::now(),
            now: 0,
            random: StdRng::seed_from_u64(seed),
            bytes: vec![0; usize::try_from(BLOCKS * BLOCK).unwrap()],
            requests: BTreeMap::new(),
            next: 0,
            posted: BTreeMap::new(),
            lost_until: 0,
            stalled_until: 0,
            failing_until: 0,
            bad: BTreeMap::new(),
            medium_failures: Vec::new(),
            unclean: BTreeSet::new(),
            oracle: Oracle::default(),
        }
    }

    /// A number of `0..most`.
    pub(crate) fn below(&mut self, most: u64) -> u64 {
        self.random.random_range(0..most.max(1))
    }

    /// True once in `n`.
    pub(crate) fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// The path is lost from now on: what is under way fails some time before it is back.
    pub(crate) fn lose_path(&mut self, lasts: u64) {
        let (now, until) = (self.now, self.now + lasts);
        self.lost_until = until;
        let ids: Vec<u64> = self.requests.keys().copied().collect();
        for id in ids {
            // Some as the path comes back.
            let fails_at = match self.once_in(4) {
                true => until - self.below(lasts.min(2 * MS)),
                false => now + self.below(lasts),
            };
            let outcome = self.path_failure();
            let landed = self.once_in(2);
            let late = self.lands_late(fails_at);
            let Some(request) = self.requests.get_mut(&id) else {
                continue;
            };
            if request.completes.is_none() {
                continue;
            }
            request.completes = Some(fails_at);
            request.outcome = outcome;
            if !landed {
                request.lands = request.lands.and(late);
            }
        }
    }

    pub(crate) fn stall(&mut self, lasts: u64) {
        let now = self.now;
        self.stalled_until = now + lasts;
        for request in self.requests.values_mut() {
            let later = |at: u64| if at > now { at + lasts } else { at };
            if request.completes.is_some() {
                request.lands = request.lands.map(later);
            }
            request.completes = request.completes.map(later);
        }
    }

    /// The administrator repairs the places of one guest's disk.
    pub(crate) fn repair(&mut self, guest: usize) {
        let mine = |block: u64| {
            let mut runs = extents(guest).into_iter();
            runs.any(|run| (run.start.0..run.start.0 + run.length.0 / BLOCK).contains(&block))
        };
        self.bad.retain(|block, _| !mine(*block));
    }

    /// The node was reset: half of what is under way is lost, the rest lands within the settle time.
    pub(crate) fn reset(&mut self) {
        let now = self.now;
        let ids: Vec<u64> = self.requests.keys().copied().collect();
        for id in ids {
            let (lost, late) = (self.once_in(2), now + self.below(SETTLE_NANOS));
            if let Some(request) = self.requests.get_mut(&id) {
                request.completes = None;
                request.lands = request.lands.filter(|_| !lost).map(|at| at.min(late));
            }
        }
        self.posted.clear();
    }

    /// A path's errors come in many ways.
    fn path_failure(&mut self) -> Outcome {
        let errno = self.below(PATH_ERRORS.len() as u64);
        let errno = PATH_ERRORS[usize::try_from(errno).unwrap()];
        Outcome::Failed(errno, Cause::Path)
    }

    /// When a write that fails at `at` takes effect.
    fn lands_late(&mut self, at: u64) -> Option<u64> {
        let late = self.below(SETTLE_NANOS);
        (!self.once_in(3)).then_some(at + late)
    }

    fn submit(&mut self, life: Life, tag: u64, command: DeviceCommand) {
        let took = 100_000 + self.latency();
        let from = self.now.max(self.stalled_until);
        let completes = from + took;
        let outcome = self.outcome(life, &command);
        let lands = match (&command, outcome) {
            (DeviceCommand::Write { .. }, Outcome::Done(_)) => Some(from + self.below(took)),
            (DeviceCommand::Write { .. }, Outcome::Failed(_, Cause::Path | Cause::Medium)) => {
                self.lands_late(completes)
            }
            _ => None,
        };
        let id = self.next;
        self.next += 1;
        let completes = Some(completes);
        let request = Request {
            life,
            tag,
            command,
            lands,
            completes,
            outcome,
        };
        self.requests.insert(id, request);
    }

    fn outcome(&mut self, (guest, _): Life, command: &DeviceCommand) -> Outcome {
        if self.lost_until > self.now {
            return self.path_failure();
        }
        if self.once_in(50) {
            let errno = [libc::EAGAIN, libc::EINTR][usize::try_from(self.below(2)).unwrap()];
            return Outcome::Failed(errno, Cause::Transient);
        }
        let (start, end, is_write) = range(command);
        let mut bad = (start / BLOCK..end.div_ceil(BLOCK)).filter_map(|block| self.bad.get(&block));
        let bad = bad.find(|bad| if is_write { bad.writes } else { bad.reads });
        let mut errno = bad.map(|bad| bad.errno);
        if is_write && self.failing_until > self.now && self.once_in(3) {
            errno = Some(libc::EIO);
        }
        if let Some(errno) = errno {
            let at = self.now;
            let failure = Failure {
                guest,
                start,
                end,
                at,
            };
            self.medium_failures.push(failure);
            return Outcome::Failed(errno, Cause::Medium);
        }
        let blocks = (end - start) / BLOCK;
        let done = if blocks > 1 && self.once_in(10) {
            (1 + self.below(blocks - 1)) * BLOCK
        } else {
            end - start
        };
        Outcome::Done(usize::try_from(done).unwrap())
    }

    /// Mostly under 2 ms, sometimes a quarter of a second.
    fn latency(&mut self) -> u64 {
        let most = if self.once_in(200) { 250 } else { 2 };
        self.below(most * MS)
    }

    /// When something next happens by itself; none if nothing is under way.
    pub(crate) fn next_event(&self) -> Option<u64> {
        let events = |request: &Request| [request.lands, request.completes];
        self.requests.values().flat_map(events).flatten().min()
    }

    /// When the disk's next completion is posted; at once if one is.
    pub(crate) fn next_completion(&self, life: Life) -> Option<u64> {
        if self
            .posted
            .get(&life)
            .is_some_and(|posted| !posted.is_empty())
        {
            return Some(self.now);
        }
        let mine = self
            .requests
            .values()
            .filter(|request| request.life == life);
        mine.filter_map(|request| request.completes).min()
    }

    pub(crate) fn writes_in_flight(&self, life: Life) -> bool {
        let mut mine = self
            .requests
            .values()
            .filter(|request| request.life == life);
        mine.any(|request| request.completes.is_some() && range(&request.command).2)
    }

    /// Whether the kernel has a command of this life left.
    pub(crate) fn is_in_flight(&self, life: Life) -> bool {
        let mut mine = self
            .requests
            .values()
            .filter(|request| request.life == life);
        mine.any(|request| request.completes.is_some())
    }

    /// The contents of one.
    pub(crate) fn sector(&self, number: u64) -> &[u8] {
        let at = usize::try_from(number).unwrap() * SECTOR;
        &self.bytes[at..at + SECTOR]
    }

    pub(crate) fn is_unclean(&self, life: Life) -> bool {
        self.unclean.contains(&life)
    }

    /// Lets everything happen that is due until `to`, in order.
    pub(crate) fn advance(&mut self, to: u64) {
        loop {
            let due = self.requests.iter().flat_map(|(id, request)| {
                let lands = request.lands.map(|at| (at, *id, true));
                let completes = request.completes.map(|at| (at, *id, false));
                [lands, completes].into_iter().flatten()
            });
            // Of the same moment, an effect comes before its completion.
            let due = due.min_by_key(|(at, id, lands)| (*at, *id, !lands));
            let Some((at, id, lands)) = due.filter(|(at, ..)| *at <= to) else {
                self.now = self.now.max(to);
                return;
            };
            self.now = self.now.max(at);
            if lands {
                self.land(id);
            } else {
                self.post(id);
            }
            self.requests
                .retain(|_, request| request.lands.is_some() || request.completes.is_some());
        }
    }

    fn land(&mut self, id: u64) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        request.lands = None;
        let DeviceCommand::Write { offset, bytes } = &request.command else {
            return;
        };
        let count = match request.outcome {
            Outcome::Done(count) => count,
            Outcome::Failed(..) => bytes.len(),
        };
        let at = usize::try_from(*offset).unwrap();
        for (n, sector) in bytes[..count].chunks_exact(SECTOR).enumerate() {
            let number = offset / SECTOR as u64 + n as u64;
            self.oracle.landed(number, Stamp::read(sector));
        }
        self.bytes[at..at + count].copy_from_slice(&bytes[..count]);
    }

    fn post(&mut self, id: u64) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        request.completes = None;
        let result = match (&request.command, request.outcome) {
            (_, Outcome::Failed(errno, _)) => Err(io::Error::from_raw_os_error(errno)),
            (DeviceCommand::Read { offset, .. }, Outcome::Done(count)) => {
                let at = usize::try_from(*offset).unwrap();
                Ok(Transferred::Read(self.bytes[at..at + count].to_vec()))
            }
            (_, Outcome::Done(count)) => Ok(Transferred::Written(count)),
        };
        let ended_badly =
            matches!(request.outcome, Outcome::Failed(_, cause) if cause != Cause::Transient);
        let is_read = matches!(request.command, DeviceCommand::Read { .. });
        let (life, tag) = (request.life, request.tag);
        if ended_badly && !is_read {
            self.unclean.insert(life);
        }
        self.posted
            .entry(life)
            .or_default()
            .push_back((tag, result));
    }
}

/// The first byte, the byte after the last one, and whether it writes.
fn range(command: &DeviceCommand) -> (u64, u64, bool) {
    match command {
        DeviceCommand::Read { offset, length } => (*offset, offset + *length as u64, false),
        DeviceCommand::Write { offset, bytes } => (*offset, offset + bytes.len() as u64, true),
        DeviceCommand::Sync => (0, 0, false),
    }
}

/// The device as one opened disk has it.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) device: Rc<RefCell<Device>>,
    pub(crate) life: Life,
    pub(crate) gate: Arc<Gate>,
    pub(crate) killed: Rc<Cell<bool>>,
}

impl SimulatedDevice for Port {
    fn submit(&mut self, tag: u64, command: DeviceCommand) {
        if matches!(command, DeviceCommand::Write { .. }) {
            self.gate.assert_open();
        }
        self.device.borrow_mut().submit(self.life, tag, command);
    }

    fn reap(&mut self) -> Option<(u64, io::Result<Transferred>)> {
        let mut device = self.device.borrow_mut();
        device.posted.get_mut(&self.life)?.pop_front()
    }

    fn wait(&mut self) {
        let mut device = self.device.borrow_mut();
        while let Some(at) = device.next_completion(self.life) {
            if device
                .posted
                .get(&self.life)
                .is_some_and(|posted| !posted.is_empty())
            {
                return;
            }
            device.advance(at);
        }
    }

    fn is_killed(&self) -> bool {
        // A failed check ends the run.
        self.killed.get() || std::thread::panicking()
    }

    fn now(&self) -> Instant {
        let device = self.device.borrow();
        device.start + Duration::from_nanos(device.now)
    }
}

pub(crate) const BLOCK: u64 = 4096;
/// Of the device.
const BLOCKS: u64 = 96;
pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SETTLE: Duration = Duration::from_secs(4);
pub(crate) const SETTLE_NANOS: u64 = 4000 * MS;
const PATH_ERRORS: [i32; 8] = [
    libc::EIO,
    libc::EIO,
    libc::EIO,
    libc::ENOLINK,
    libc::ETIMEDOUT,
    libc::ENODEV,
    libc::EHOSTDOWN,
    libc::EBADE,
];
