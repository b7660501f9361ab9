//! A guest's disk: the real disk engine and gate, on the simulated device and clock.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bascule_devices::GuestRam;
use bascule_devices::disk::{
    Completion, DeviceCommand, Disk, DiskEngine, DiskRequest, ErrorPolicy, ExtentMap, Operation,
    SimulatedDevice, SimulatedRing, Transferred, VolumeGate, WriteGate,
};
use bascule_devices::virtio::{Segment, Segments};
use bascule_types::{Lba, Owner, WriterState};
use bascule_volume_format::{BLOCK_BYTES, BLOCK_BYTES_U64};
use vm_memory::{Bytes, GuestAddress};

use crate::disk::{Initiator, What};
use crate::guest::Opened;
use crate::profile::Moment;
use crate::scheduler::nanos;
use crate::world::{SimulatedHost, World};

/// The disk of one process.
#[derive(Debug)]
pub(crate) struct GuestDisk {
    engine: DiskEngine<SimulatedRing<Port>>,
    gate: Arc<VolumeGate<SimulatedHost>>,
    ram: Arc<GuestRam>,
    port: PortParts,
}

impl GuestDisk {
    pub(crate) fn new(
        world: &Arc<World>,
        node: u8,
        pid: u32,
        opened: Opened,
        owner: Owner,
    ) -> Self {
        let clock = SimulatedHost {
            world: Arc::clone(world),
            node,
        };
        let port = PortParts {
            world: Arc::clone(world),
            node,
            pid,
            initiator: world.initiator(node),
        };
        let gate = VolumeGate::with_clock(clock, opened.gate, owner, Some(opened.page));
        let gate = Arc::new(gate);
        let disk = Disk {
            file: opened.device,
            extents: ExtentMap::new(&opened.extents, opened.size).expect("an extent map"),
            block_bytes: 4096,
            gate: Arc::clone(&gate) as Arc<dyn WriteGate>,
            probe_offset: 0,
            errors: Arc::new(ErrorPolicy::default()),
            settle: opened.settle,
        };
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("memory");
        let ram = Arc::new(ram);
        let commands = Port {
            parts: port.clone(),
            start: Instant::now(),
            in_flight: Vec::new(),
        };
        let ring = SimulatedRing::new(commands, ROOM);
        let engine = DiskEngine::with_ring(disk, Arc::clone(&ram), ring);
        Self {
            engine: engine.with_rules(world.setup.disk_rules),
            gate,
            ram,
            port,
        }
    }

    pub(crate) fn set_owner(&self, owner: Owner) {
        self.gate.set_owner(owner);
    }

    pub(crate) fn read(&mut self, block: u64) -> io::Result<Vec<u8>> {
        let offset = block * BLOCK_BYTES_U64;
        let data = one_block();
        self.perform(Operation::Read { offset, data }, &mut |_| {})?;
        Ok(self.load())
    }

    /// Calls `stalled` every now and then while the guest waits.
    pub(crate) fn write(
        &mut self,
        block: u64,
        bytes: &[u8],
        stalled: &mut dyn FnMut(&Self),
    ) -> io::Result<()> {
        self.store(bytes);
        let operation = Operation::Write {
            offset: block * BLOCK_BYTES_U64,
            data: one_block(),
            durable: true,
        };
        self.perform(operation, stalled)
    }

    /// The first failure of a write, once: to be reported to the volume's process.
    pub(crate) fn take_failure(&mut self) -> Option<String> {
        let (operation, error) = self.engine.take_failure()?;
        Some(format!("{operation}: {error}"))
    }

    fn progress(&mut self) -> Vec<Completion> {
        self.engine.progress().expect("the ring")
    }

    fn load(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        self.ram.read_slice(&mut bytes, DATA).expect("memory");
        bytes
    }

    fn store(&self, bytes: &[u8]) {
        self.ram.write_slice(bytes, DATA).expect("memory");
    }

    /// As the device's thread does, until the request is answered.
    fn perform(&mut self, operation: Operation, stalled: &mut dyn FnMut(&Self)) -> io::Result<()> {
        self.engine.enqueue(DiskRequest { tag: 0, operation });
        loop {
            let completions = self.progress();
            let is_idle = self.engine.stats().in_flight == 0
                && self.gate.writer_state() == WriterState::Clean;
            self.port.set_busy(!is_idle);
            if let Some(completion) = completions.into_iter().next() {
                return completion.result;
            }
            let scheduler = &self.port.world.scheduler;
            let now = scheduler.now();
            let wait = self.engine.retry_after().unwrap_or(FOR_EVER);
            // The gate is polled less often than by the real thread, which costs the simulation less.
            let wait = now.saturating_add(nanos(wait.max(POLL)));
            let next = self.engine.ring().device.next_completion().unwrap_or(wait);
            scheduler.block(None, next.min(wait), false);
            if self.engine.stats().stalled {
                stalled(self);
            }
        }
    }
}

#[derive(Clone)]
struct PortParts {
    world: Arc<World>,
    node: u8,
    pid: u32,
    initiator: Initiator,
}

impl std::fmt::Debug for PortParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PortParts({:?}, {})", self.initiator, self.pid)
    }
}

impl PortParts {
    fn set_busy(&self, is_busy: bool) {
        self.world.set_busy(self.node, self.pid, is_busy);
    }

    /// Between the check of the gate and the submission the process may stand still for any time.
    fn has_passed(&self) {
        self.set_busy(true);
        self.world.reached(Moment::Passed, self.node);
        if self.world.is_falsely_unwatched(self.node) {
            self.world.reached(Moment::PassedUnwatched, self.node);
        }
        let stop = self.world.scheduler.below(3_000_000);
        self.world.scheduler.sleep(Duration::from_nanos(stop));
    }
}

/// What the engine's commands go to.
#[derive(Debug)]
struct Port {
    parts: PortParts,
    start: Instant,
    in_flight: Vec<InFlight>,
}

#[derive(Debug)]
struct InFlight {
    tag: u64,
    id: u64,
    lba: Lba,
    /// To be read; none of a write.
    length: Option<usize>,
}

impl Port {
    fn next_completion(&self) -> Option<u64> {
        let disk = &self.parts.world.disk;
        let in_flight = self.in_flight.iter();
        in_flight.map(|request| disk.completes(request.id)).min()
    }
}

impl SimulatedDevice for Port {
    fn submit(&mut self, tag: u64, command: DeviceCommand) {
        let lba = |offset: u64| Lba(offset / BLOCK_BYTES_U64);
        let PortParts {
            world,
            pid,
            initiator,
            ..
        } = self.parts.clone();
        let (lba, length, id) = match command {
            DeviceCommand::Read { offset, length } => {
                let id = world.disk.submit(initiator, pid, lba(offset), &What::Read);
                (lba(offset), Some(length), id)
            }
            DeviceCommand::Write { offset, bytes } => {
                self.parts.has_passed();
                let what = What::GuestWrite(&bytes);
                let id = world.disk.submit(initiator, pid, lba(offset), &what);
                (lba(offset), None, id)
            }
            DeviceCommand::Sync => {
                let id = world.disk.submit(initiator, pid, Lba(0), &What::Read);
                (Lba(0), Some(0), id)
            }
        };
        self.in_flight.push(InFlight {
            tag,
            id,
            lba,
            length,
        });
    }

    fn reap(&mut self) -> Option<(u64, io::Result<Transferred>)> {
        let disk = Arc::clone(&self.parts.world.disk);
        let mut in_flight = self.in_flight.iter().enumerate();
        let (place, outcome) =
            in_flight.find_map(|(place, request)| Some((place, disk.outcome(request.id)?)))?;
        let request = self.in_flight.remove(place);
        let transferred = outcome.map(|()| match request.length {
            Some(length) => {
                let mut bytes = vec![0; length];
                disk.read_now(request.lba, &mut bytes);
                Transferred::Read(bytes)
            }
            None => Transferred::Written(BLOCK_BYTES),
        });
        Some((request.tag, transferred))
    }

    fn wait(&mut self) {
        if let Some(at) = self.next_completion() {
            self.parts.world.scheduler.block(None, at, false);
        }
    }

    /// A killed process unwinds.
    fn is_killed(&self) -> bool {
        std::thread::panicking()
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_nanos(self.parts.world.scheduler.now())
    }
}

fn one_block() -> Segments {
    let segment = Segment {
        start: DATA,
        length_bytes: BLOCK_BYTES,
    };
    [segment].into_iter().collect()
}

const RAM_BYTES: usize = 1 << 16;
/// Of the one block that is under way.
const DATA: GuestAddress = GuestAddress(0x1000);
/// Commands in flight.
const ROOM: usize = 8;
const POLL: Duration = Duration::from_millis(100);
const FOR_EVER: Duration = Duration::from_secs(1 << 20);
