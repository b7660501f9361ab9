//! A guest with one disk: reads, writes and flushes of any alignment, several at a time, through the real engine; and
//! what must hold of every answer.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bascule_devices::GuestRam;
use bascule_devices::disk::{
    Completion, Disk, DiskEngine, DiskRequest, ErrorPolicy, ExtentMap, Operation, Rules,
    SimulatedRing,
};
use bascule_devices::virtio::{Segment, Segments};
use bascule_types::{Bytes as ByteCount, OnError, WriterState};
use vm_memory::{Bytes, GuestAddress};

use crate::device::{Device, Life, MS, Port, SETTLE};
use crate::gate::Gate;
use crate::oracle::{BLOCK_SECTORS, DISK_SECTORS, SECTOR, Stamp, device_sector, extents};

type Engine = DiskEngine<SimulatedRing<Port>>;

#[derive(Debug)]
pub(crate) struct Guest {
    number: usize,
    lives: u64,
    block_bytes: u32,
    rules: Rules,
    policy: OnError,
    device: Rc<RefCell<Device>>,
    ram: Arc<GuestRam>,
    pub(crate) gate: Arc<Gate>,
    errors: Arc<ErrorPolicy>,
    killed: Rc<Cell<bool>>,
    engine: Option<Engine>,
    open: Vec<Request>,
    sequence: u64,
    /// Nothing new is asked for.
    pub(crate) is_quiet: bool,
    pub(crate) gate_closed_until: u64,
    /// The process stands still, or the machine is paused, until then.
    pub(crate) stands_still_until: u64,
    hold: Hold,
    next_request_at: u64,
    /// When the engine wants to be called.
    timer_at: Option<u64>,
    /// When the guest last had a reason to wait that is not its own disk's place.
    disturbed_at: u64,
    pub(crate) completed: u64,
}

/// Whether a request is held because the device refused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    None,
    /// Until the administrator sees to it.
    Until(u64),
    /// The administrator did, once in this life: the policy is to report now.
    Over,
}

#[derive(Debug)]
struct Request {
    tag: u64,
    kind: Kind,
    first: u64,
    sectors: u64,
    sequence: u64,
    at: u64,
    /// What was acknowledged of each sector when a read was sent.
    acknowledged: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

impl Guest {
    pub(crate) fn new(number: usize, device: &Rc<RefCell<Device>>, rules: Rules) -> Self {
        let (block_bytes, pauses) = {
            let mut device = device.borrow_mut();
            (
                [512, 4096][usize::from(device.once_in(2))],
                device.once_in(2),
            )
        };
        let policy = if pauses {
            OnError::Pause
        } else {
            OnError::Report
        };
        let ranges = [(GuestAddress(0), 0x10_0000)];
        let mut guest = Self {
            number,
            lives: 0,
            block_bytes,
            rules,
            policy,
            device: Rc::clone(device),
            ram: Arc::new(GuestRam::from_ranges(&ranges).unwrap()),
            gate: Arc::new(Gate::new()),
            errors: Arc::new(ErrorPolicy::new(policy)),
            killed: Rc::new(Cell::new(false)),
            engine: None,
            open: Vec::new(),
            sequence: 0,
            is_quiet: false,
            gate_closed_until: 0,
            stands_still_until: 0,
            hold: Hold::None,
            next_request_at: 0,
            timer_at: None,
            disturbed_at: 0,
            completed: 0,
        };
        guest.start();
        guest
    }

    pub(crate) fn life(&self) -> Life {
        (self.number, self.lives)
    }

    pub(crate) fn runs(&self) -> bool {
        self.engine.is_some()
    }

    /// Opens the disk, with the guest's policy. Every earlier writer's writes have ended.
    pub(crate) fn start(&mut self) {
        self.lives += 1;
        self.gate = Arc::new(Gate::new());
        self.errors = Arc::new(ErrorPolicy::new(self.policy));
        self.killed = Rc::new(Cell::new(false));
        (self.hold, self.gate_closed_until, self.timer_at) = (Hold::None, 0, Some(0));
        let port = Port {
            device: Rc::clone(&self.device),
            life: self.life(),
            gate: Arc::clone(&self.gate),
            killed: Rc::clone(&self.killed),
        };
        let disk = Disk {
            file: std::fs::File::open("/dev/null").unwrap().into(),
            extents: ExtentMap::new(
                &extents(self.number),
                ByteCount(DISK_SECTORS * SECTOR as u64),
            )
            .unwrap(),
            block_bytes: self.block_bytes,
            gate: Arc::clone(&self.gate) as _,
            probe_offset: 0,
            errors: Arc::clone(&self.errors),
            settle: SETTLE,
        };
        let ring = SimulatedRing::new(port, ROOM);
        let engine = DiskEngine::with_ring(disk, Arc::clone(&self.ram), ring);
        self.engine = Some(engine.with_rules(self.rules));
        self.check_acknowledged();
    }

    /// kill -9: what is in flight goes on in the kernel, and nobody is told of its end.
    pub(crate) fn kill(&mut self) {
        self.killed.set(true);
        self.engine = None;
        self.open.clear();
    }

    /// Drains the disk and opens it elsewhere, at once, unless a write of it may still land. Whether it did.
    pub(crate) fn move_away(&mut self) -> bool {
        self.drain();
        let Some(engine) = &self.engine else {
            return false;
        };
        let is_held = matches!(self.hold, Hold::Until(_));
        if engine.writer_state() != WriterState::Clean || is_held {
            return false;
        }
        assert!(self.gate.is_idle() && !self.gate.has_failed());
        self.engine = None;
        self.start();
        let open = std::mem::take(&mut self.open);
        for request in &open {
            self.enqueue(request);
        }
        self.open = open;
        true
    }

    /// Nothing is submitted, and no command is in flight when it returns.
    pub(crate) fn drain(&mut self) {
        let Some(engine) = &mut self.engine else {
            return;
        };
        let drained = engine.drain().unwrap();
        // When it goes on, it begins with what was not submitted.
        self.timer_at = Some(0);
        self.answered(drained.completions);
        self.check_unclean();
    }

    /// When [`Guest::step`] is due.
    pub(crate) fn due(&self) -> Option<u64> {
        self.engine.as_ref()?;
        let device = self.device.borrow();
        if let Hold::Until(held) = self.hold {
            return Some(held.max(self.stands_still_until));
        }
        let next = (!self.is_quiet).then_some(self.next_request_at);
        let done = device.next_completion(self.life());
        let gate = (self.gate_closed_until > device.now).then_some(self.gate_closed_until);
        let due = [self.timer_at, next, done, gate]
            .into_iter()
            .flatten()
            .min();
        due.map(|at| at.max(self.stands_still_until))
    }

    /// The thread of the device runs.
    pub(crate) fn step(&mut self) {
        let now = self.device.borrow().now;
        self.note_disturbance(now);
        let closed = self.gate_closed_until > now;
        self.gate.is_open.store(!closed, Ordering::Relaxed);
        if let Hold::Until(held) = self.hold {
            if held > now {
                return;
            }
            self.resume_held();
        }
        if !self.is_quiet && self.next_request_at <= now {
            self.ask(now);
        }
        let Some(engine) = &mut self.engine else {
            return;
        };
        let completions = engine.progress().unwrap();
        let timer = engine.retry_after();
        self.timer_at = timer.map(|after| now + u64::try_from(after.as_nanos()).unwrap());
        self.answered(completions);
        self.check_unclean();
        self.check_held(now);
        self.check_progress(now);
    }

    fn note_disturbance(&mut self, now: u64) {
        let device = self.device.borrow();
        let until = [
            device.lost_until,
            device.stalled_until,
            self.gate_closed_until,
            self.stands_still_until,
            self.held_until(),
        ];
        // All of them were set before now.
        let until = until.into_iter().max().unwrap_or(0);
        self.disturbed_at = self.disturbed_at.max(until.min(now));
    }

    fn ask(&mut self, now: u64) {
        let requests = 1 + self.device.borrow_mut().below(3);
        for _ in 0..requests {
            if self.open.len() < OPEN_MAX {
                let request = self.draw(now);
                self.enqueue(&request);
                self.open.push(request);
            }
        }
        self.next_request_at = now + self.device.borrow_mut().below(40 * MS);
    }

    fn draw(&mut self, now: u64) -> Request {
        let mut device = self.device.borrow_mut();
        let kind = [Kind::Read, Kind::Write, Kind::Write, Kind::Flush];
        let kind = kind[usize::try_from(device.below(4)).unwrap()];
        let (first, sectors) = if device.once_in(2) {
            let blocks = 1 + device.below(3);
            let first = device.below(DISK_SECTORS / BLOCK_SECTORS - blocks + 1);
            (first * BLOCK_SECTORS, blocks * BLOCK_SECTORS)
        } else {
            let sectors = 1 + device.below(12);
            (device.below(DISK_SECTORS - sectors + 1), sectors)
        };
        let tags = 0..OPEN_MAX as u64;
        let free = |tag: &u64| self.open.iter().all(|request| request.tag != *tag);
        let tag = tags.into_iter().find(free).unwrap();
        self.sequence += 1;
        let acknowledged = |sector| device.oracle.acknowledged(self.number, sector);
        Request {
            tag,
            kind,
            first,
            sectors,
            sequence: self.sequence,
            at: now,
            acknowledged: (first..first + sectors).map(acknowledged).collect(),
        }
    }

    fn enqueue(&mut self, request: &Request) {
        let length_bytes = usize::try_from(request.sectors).unwrap() * SECTOR;
        // Aligned to blocks, to sectors, and not at all.
        let aside = [0, 512, 1][usize::try_from(request.sequence % 3).unwrap()];
        let start = GuestAddress(0x1000 + request.tag * 0x8000 + aside);
        let segment = Segment {
            start,
            length_bytes,
        };
        let data: Segments = [segment].into_iter().collect();
        let offset = request.first * SECTOR as u64;
        let operation = match request.kind {
            Kind::Read => Operation::Read { offset, data },
            Kind::Write => {
                let stamps = request.stamps(self.number);
                let bytes: Vec<u8> = stamps.flat_map(Stamp::bytes).collect();
                self.ram.write_slice(&bytes, start).unwrap();
                let durable = request.sequence.is_multiple_of(5);
                Operation::Write {
                    offset,
                    data,
                    durable,
                }
            }
            Kind::Flush => Operation::Flush,
        };
        let tag = request.tag;
        if let Some(engine) = &mut self.engine {
            engine.enqueue(DiskRequest { tag, operation });
        }
    }

    fn answered(&mut self, completions: Vec<Completion>) {
        for Completion { tag, result } in completions {
            let place = self.open.iter().position(|request| request.tag == tag);
            let request = self.open.remove(place.expect("a request of this tag"));
            self.completed += 1;
            match (result, request.kind) {
                (Err(error), Kind::Read | Kind::Write) => self.check_error(&request, &error),
                (Ok(()), Kind::Write) => {
                    let mut device = self.device.borrow_mut();
                    let stamps = request.stamps(self.number);
                    stamps.for_each(|stamp| device.oracle.acknowledge(stamp));
                }
                (Ok(()), Kind::Read) => self.check_read(&request),
                (_, Kind::Flush) => {}
            }
        }
    }

    /// A guest sees the errors of its own places alone, and with the policy to pause none.
    fn check_error(&self, request: &Request, error: &std::io::Error) {
        let device = self.device.borrow();
        let (from, to) = (request.first, request.first + request.sectors);
        let block = u64::from(self.block_bytes);
        let touches = |start: u64, end: u64| {
            (from..to).any(|sector| {
                let at = device_sector(self.number, sector) * SECTOR as u64;
                let at = at - at % block;
                start < at + block && at < end
            })
        };
        let mut failures = device.medium_failures.iter();
        let own = failures.any(|failure| {
            failure.guest == self.number
                && failure.at >= request.at
                && touches(failure.start, failure.end)
        });
        assert!(
            own,
            "guest {} got {error} for {request:?}, which the device did not refuse",
            self.number
        );
        assert!(
            !self.errors_pause(),
            "guest {} got {error} for {request:?} instead of being paused",
            self.number
        );
    }

    fn errors_pause(&self) -> bool {
        self.policy == OnError::Pause && self.hold != Hold::Over
    }

    fn held_until(&self) -> u64 {
        match self.hold {
            Hold::Until(at) => at,
            _ => 0,
        }
    }

    fn check_read(&self, request: &Request) {
        let mut bytes = vec![0; usize::try_from(request.sectors).unwrap() * SECTOR];
        let aside = [0, 512, 1][usize::try_from(request.sequence % 3).unwrap()];
        let start = GuestAddress(0x1000 + request.tag * 0x8000 + aside);
        self.ram.read_slice(&mut bytes, start).unwrap();
        let sectors = bytes.chunks_exact(SECTOR).zip(&request.acknowledged);
        for ((bytes, acknowledged), sector) in sectors.zip(request.first..) {
            self.check_sector(sector, bytes, *acknowledged);
        }
    }

    fn check_sector(&self, sector: u64, bytes: &[u8], acknowledged: u64) {
        let stamp = Stamp::read(bytes);
        let sequence = stamp.map_or(0, |stamp| stamp.sequence);
        assert!(
            sequence >= acknowledged && sequence <= self.sequence,
            "I3: guest {} read {stamp:?} at sector {sector}, where write {acknowledged} was acknowledged",
            self.number
        );
        let at_home =
            stamp.is_none_or(|stamp| (stamp.guest, stamp.sector) == (self.number, sector));
        assert!(
            at_home,
            "guest {} read {stamp:?} at sector {sector}",
            self.number
        );
    }

    /// I3: all that was acknowledged is on the device.
    pub(crate) fn check_acknowledged(&self) {
        let device = self.device.borrow();
        for sector in 0..DISK_SECTORS {
            let bytes = device.sector(device_sector(self.number, sector));
            let acknowledged = device.oracle.acknowledged(self.number, sector);
            self.check_sector(sector, bytes, acknowledged);
        }
    }

    /// A writer is unclean exactly if a write or flush of it failed, and the gate was told so.
    fn check_unclean(&self) {
        let Some(engine) = &self.engine else { return };
        let failed = self.device.borrow().is_unclean(self.life());
        let unclean = engine.writer_state() == WriterState::Unclean;
        assert_eq!(
            unclean, failed,
            "guest {}: unclean is {unclean}, and a write or flush failed is {failed}",
            self.number
        );
        assert_eq!(self.gate.has_failed(), failed, "the gate was not told");
        let in_flight = self.device.borrow().writes_in_flight(self.life());
        assert!(
            !in_flight || !self.gate.is_idle(),
            "I1: the gate was told that no write is in flight"
        );
    }

    /// With the policy to pause, a request that the device refuses is held, and nothing else.
    fn check_held(&mut self, now: u64) {
        let Some(engine) = &mut self.engine else {
            return;
        };
        let Some((operation, error)) = engine.take_held() else {
            return;
        };
        assert!(self.errors_pause(), "held, and not to be paused");
        let mut device = self.device.borrow_mut();
        let mut failures = device.medium_failures.iter();
        let own = failures.any(|failure| failure.guest == self.number);
        assert!(own, "guest {} is held: {operation}: {error}", self.number);
        self.hold = Hold::Until(now + device.below(5000 * MS));
        drop(device);
        self.drain();
    }

    /// The administrator has repaired the place, or not, and sets the policy to report: the guest goes on.
    fn resume_held(&mut self) {
        let mut device = self.device.borrow_mut();
        if device.once_in(2) {
            device.repair(self.number);
        }
        drop(device);
        self.errors.set(OnError::Report);
        self.hold = Hold::Over;
        if let Some(engine) = &mut self.engine {
            engine.retry_held();
        }
    }

    /// Nobody waits for longer than its own commands take, and failed ones settle, unless there is a reason.
    fn check_progress(&self, now: u64) {
        for request in &self.open {
            let since = request.at.max(self.disturbed_at);
            assert!(
                now - since < WITHIN,
                "guest {} waits for {request:?} without a reason since {since}, at {now}",
                self.number
            );
        }
    }

    /// For messages.
    pub(crate) fn describe(&self) -> String {
        let engine = self.engine.as_ref();
        format!(
            "{} open, due {:?}, {:?}, gate closed until {}, stands still until {}, {:?}, retries after {:?}\n",
            self.open.len(),
            self.due(),
            self.hold,
            self.gate_closed_until,
            self.stands_still_until,
            engine.map(DiskEngine::stats),
            engine.map(DiskEngine::retry_after),
        )
    }

    /// How many requests wait for an answer.
    pub(crate) fn open(&self) -> usize {
        self.open.len()
    }
}

impl Request {
    fn stamps(&self, guest: usize) -> impl Iterator<Item = Stamp> + use<> {
        let sequence = self.sequence;
        (self.first..self.first + self.sectors).map(move |sector| Stamp {
            guest,
            sector,
            sequence,
        })
    }
}

/// Requests that a guest has open at a time.
const OPEN_MAX: usize = 6;
/// Commands that the ring takes: fewer than a guest may have, so that some wait.
const ROOM: usize = 8;
/// Several overlapping writes, each of which waits until the one before it, which failed, has settled.
const WITHIN: u64 = 25_000 * MS;
