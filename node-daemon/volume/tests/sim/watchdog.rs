//! `bascule-watchdog` of each node: the program's own decisions (start, keepalives, answers) on a device that
//! the kernel pets when it is opened, when its timeout is set and when its last descriptor is closed. Its
//! process and the holder end at any time; the node's daemon starts the process again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bascule_ipc::IpcError;
use bascule_ipc::watchdog::{Request, Response};
use bascule_types::{Owner, VolumeId};
use bascule_volume_gate::{Clock, GateReader};
use bascule_volume_protocol::{Drift, Mutation, Rules};
use bascule_watchdog::keepalive::{self, Shared, Slot};
use bascule_watchdog::{
    BoxedDevice, Driver, EnlistedVolumes, EnlistmentStore, FoundHolder, Holder, HolderError, Host,
    LinuxDevice, StoreError, WatchdogDevice, device_slot, server,
};
use rustix::io::Errno;

use crate::disk::Initiator;
use crate::profile::Moment;
use crate::scheduler::{Group, nanos};
use crate::world::{NODES, SimulatedHost, World};

/// What a node has of its watchdog.
#[derive(Default)]
pub(crate) struct Watchdog {
    /// Whether `bascule-watchdog` runs.
    lives: bool,
    /// What it shares with its clients, once it serves.
    shared: Option<Arc<Shared>>,
    /// `watchdog.json`.
    list: BTreeMap<VolumeId, PathBuf>,
    device: Device,
    /// The number of the holder that runs.
    holder: Option<u64>,
    holders: u64,
    /// The volume was withdrawn when the lease of this owner had ended: its reset is not awaited.
    settled: Option<Owner>,
}

#[derive(Default)]
struct Device {
    /// Descriptors: of the process and of the holder.
    open: u32,
    /// Armed since it was first opened.
    petted_at: Option<u64>,
    seconds: i32,
    /// Within the timeout that follows a keepalive after the lease has ended.
    late_until: u64,
}

impl Watchdog {
    /// Whether it watches the volume.
    pub(crate) fn watches(&self) -> bool {
        !self.list.is_empty()
    }

    /// The policy's assumption: after a late keepalive nobody closes the last descriptor.
    fn may_close(&self, rules: Rules, now: u64) -> bool {
        self.device.open != 1
            || rules.breaks(Mutation::NoSecondHolder)
            || now >= self.device.late_until
    }

    fn close(&mut self, now: u64, is_late: bool) {
        self.device.open -= 1;
        if self.device.open == 0 {
            self.device.pet(now, is_late);
        }
    }
}

impl Device {
    fn pet(&mut self, now: u64, is_late: bool) {
        self.petted_at = Some(now);
        if is_late {
            self.late_until = now + self.timeout();
        }
    }

    fn timeout(&self) -> u64 {
        let seconds = u64::try_from(self.seconds).unwrap_or(0);
        nanos(Duration::from_secs(seconds))
    }
}

impl World {
    /// The part of the node's daemon that starts the process again.
    pub(crate) fn keep_watchdog_running(self: &Arc<Self>, node: u8) {
        loop {
            let lives = {
                let watchdog = &mut self.nodes()[usize::from(node)].watchdog;
                std::mem::replace(&mut watchdog.lives, true)
            };
            if !lives {
                let world = Arc::clone(self);
                let group = watchdog_of(node);
                (self.scheduler).spawn(group, "watchdog", move || world.watch(node));
            }
            self.scheduler.sleep(Duration::from_millis(500));
        }
    }

    /// The process, as its `main` builds it.
    fn watch(self: &Arc<Self>, node: u8) {
        // An error ends the process.
        drop(self.try_watch(node));
        let watchdog = &mut self.nodes()[usize::from(node)].watchdog;
        watchdog.shared = None;
        watchdog.lives = false;
    }

    fn try_watch(self: &Arc<Self>, node: u8) -> anyhow::Result<()> {
        let machine = SimulatedHost {
            world: Arc::clone(self),
            node,
        };
        let list = Box::new(List(machine.clone()));
        let volumes = EnlistedVolumes::load(list, self.setup.rules)?;
        let clock: Arc<dyn Clock> = Arc::new(machine.clone());
        let host: Arc<dyn Host> = Arc::new(machine);
        let slot = device_slot(&host, &volumes, self.setup.rules)?;
        let device: Option<&dyn WatchdogDevice> = match &slot {
            Slot::Open(device) => Some(device),
            Slot::Waiting(_) => None,
        };
        let shared = Shared::new(device, volumes, clock);
        self.nodes()[usize::from(node)].watchdog.shared = Some(Arc::clone(&shared));
        Ok(keepalive::run(slot, &shared)?)
    }

    /// kill -9, as far as the policy's assumption goes.
    pub(crate) fn kill_watchdog(&self, node: u8) {
        let now = self.scheduler.now();
        let initiator = self.initiator(node);
        {
            let watchdog = &mut self.nodes()[usize::from(node)].watchdog;
            if !watchdog.lives || !watchdog.may_close(self.setup.rules, now) {
                return;
            }
            watchdog.shared = None;
        }
        let group = watchdog_of(node);
        self.scheduler.kill(false, |other| other == group);
        if self.is_in_boot(initiator) {
            self.nodes()[usize::from(node)].watchdog.lives = false;
        }
    }

    /// kill -9 of the holder.
    pub(crate) fn kill_holder(&self, node: u8) {
        let (now, is_late) = (self.scheduler.now(), self.has_lapsed(node));
        let watchdog = &mut self.nodes()[usize::from(node)].watchdog;
        if watchdog.holder.is_some() && watchdog.may_close(self.setup.rules, now) {
            watchdog.holder = None;
            watchdog.close(now, is_late);
        }
    }

    /// Whether the lease of an enlisted volume has ended.
    fn has_lapsed(&self, node: u8) -> bool {
        let now = self.node_time(node);
        let pages: Vec<PathBuf> = {
            let nodes = self.nodes();
            nodes[usize::from(node)]
                .watchdog
                .list
                .values()
                .cloned()
                .collect()
        };
        let lapsed = |page: &PathBuf| match GateReader::open(page) {
            Ok(page) => !page.view().lease_is_valid(now),
            Err(_) => true,
        };
        pages.iter().any(lapsed)
    }

    /// The process may stand still between its decision and the keepalive.
    fn before_keepalive(self: &Arc<Self>, node: u8) {
        let now = self.node_time(node);
        let view = self.gate_view(node);
        let left = view.map(|view| view.expiry.since(now)).unwrap_or_default();
        let is_last = (1..1000).contains(&left.as_millis());
        let moment = if is_last {
            Moment::PettingLast
        } else {
            Moment::Petting
        };
        self.reached(moment, node);
        self.scheduler.preempt();
    }

    fn pet(&self, node: u8) {
        let (now, is_late) = (self.scheduler.now(), self.has_lapsed(node));
        let watchdog = &mut self.nodes()[usize::from(node)].watchdog;
        watchdog.device.pet(now, is_late);
    }

    /// The watchdog devices, which run on while a node is frozen. Returns the nodes to reset.
    pub(crate) fn fired(&self) -> Vec<u8> {
        let now = self.scheduler.now();
        let nodes = self.nodes();
        let fired = |device: &Device| {
            (device.petted_at).is_some_and(|petted| now >= petted + device.timeout())
        };
        let all = nodes.iter().zip(0..);
        let all = all.filter(|(node, _)| node.is_up && fired(&node.watchdog.device));
        all.map(|(_, n)| n).collect()
    }

    /// I1: a node that does not renew is reset within W and the volume's watchdog time of its last
    /// renewal. The takeover of its VMs is built on that.
    pub(crate) fn assert_reset_in_time(&self, node: u8) {
        let Some((view, owner)) = self
            .gate_view(node)
            .and_then(|view| Some((view, view.owner?)))
        else {
            return;
        };
        {
            let watchdog = &self.nodes()[usize::from(node)].watchdog;
            let is_closed = view.expiry.0 == 0;
            if !watchdog.watches() || watchdog.settled == Some(owner) || is_closed {
                return;
            }
        }
        let timings = self.disk.superblock().timings;
        let renewed_before = self.node_time(node).since(view.expiry) + timings.lease;
        let most = timings.watch + timings.watchdog;
        assert!(
            Drift::ASSUMED.watch_min(renewed_before) <= most,
            "I1: node {node} was reset {renewed_before:?} after the last renewal of {owner}, and taken over from \
             as if it had been reset within {most:?}"
        );
    }

    /// A node whose writers are drained, or that has none, is not reset however long its storage stalls: as long
    /// as the processes that withdraw its volume run, and are not kept from it.
    pub(crate) fn note_idle(&self) {
        let now = self.scheduler.now();
        for node in 0..NODES {
            let stands_still = self.scheduler.stands_still(watchdog_of(node)) || self.is_deaf(node);
            let node = &mut self.nodes()[usize::from(node)];
            let serves = node.volume.is_some() && node.watchdog.shared.is_some();
            let is_idle = serves && !stands_still && node.busy.is_empty();
            node.idle_since = node.idle_since.or(Some(now)).filter(|_| is_idle);
        }
    }

    /// After [`World::note_idle`].
    pub(crate) fn assert_reset_needed(&self, node: u8) {
        let now = self.scheduler.now();
        let idle_since = self.nodes()[usize::from(node)].idle_since;
        let idle = idle_since.map(|since| Duration::from_nanos(now - since));
        assert!(
            idle.is_none_or(|idle| idle < WITHDRAWN_WITHIN),
            "node {node} was reset without need: nothing was in flight for {idle:?}; {}",
            self.describe()
        );
    }

    fn is_in_boot(&self, initiator: Initiator) -> bool {
        let is_up = self.nodes()[usize::from(initiator.0)].is_up;
        is_up && self.initiator(initiator.0) == initiator
    }

    /// A call of the volume's process: a request that the server has read is answered late rather than
    /// never, as it was sent.
    pub(crate) fn call_watchdog(
        self: &Arc<Self>,
        node: u8,
        request: &Request,
    ) -> Result<Response, IpcError> {
        self.scheduler.preempt();
        let shared = self.nodes()[usize::from(node)].watchdog.shared.clone();
        let shared = shared.filter(|_| !self.is_deaf(node));
        let Some(shared) = shared else {
            // At once, or after a while.
            let hangs = self.scheduler.below(2) * self.scheduler.below(4000);
            self.scheduler.sleep(Duration::from_millis(hangs));
            return Err(IpcError::Closed);
        };
        if self.scheduler.stands_still(watchdog_of(node)) {
            // Nobody greets the client, which sends no request then.
            self.scheduler.sleep(CALL_TIMEOUT);
            return Err(IpcError::Closed);
        }
        let request = request.clone();
        let (late, world) = (self.answers_late(), Arc::clone(self));
        let answer = move || {
            if let Some(late) = late {
                world.scheduler.sleep(late);
            }
            server::answer(request, &shared)
        };
        let answered = self.run_in(watchdog_of(node), "client", answer, CALL_TIMEOUT);
        answered.ok_or(IpcError::Closed)
    }
}

/// `watchdog.json` of a node.
#[derive(Debug)]
struct List(SimulatedHost);

impl EnlistmentStore for List {
    fn load(&self) -> Result<BTreeMap<VolumeId, PathBuf>, StoreError> {
        let nodes = self.0.world.nodes();
        Ok(nodes[usize::from(self.0.node)].watchdog.list.clone())
    }

    fn save(&self, enlisted: &BTreeMap<VolumeId, PathBuf>) -> Result<(), StoreError> {
        let world = &self.0.world;
        let now = world.node_time(self.0.node);
        let view = world.gate_view(self.0.node);
        let watchdog = &mut world.nodes()[usize::from(self.0.node)].watchdog;
        match view {
            Some(view) if enlisted.is_empty() => watchdog.settled = view.owner,
            Some(view) if view.lease_is_valid(now) => watchdog.settled = None,
            _ => {}
        }
        watchdog.list.clone_from(enlisted);
        Ok(())
    }
}

impl Host for SimulatedHost {
    fn open_device(&self) -> io::Result<BoxedDevice> {
        if self.watchdog(|watchdog| watchdog.device.open > 0) {
            return Err(Errno::BUSY.into());
        }
        self.world.before_keepalive(self.node);
        self.watchdog(|watchdog| {
            watchdog.device.open = 1;
            if watchdog.device.petted_at.is_none() {
                watchdog.device.seconds = UNSET_SECONDS;
            }
        });
        self.world.pet(self.node);
        let timeout = Duration::from_secs(self.world.setup.watchdog_seconds);
        let device = LinuxDevice::open(Descriptor::new(self)?, timeout, false)?;
        Ok(Box::new(device))
    }

    fn find_holder(&self) -> Result<Option<FoundHolder>, HolderError> {
        self.world.scheduler.preempt();
        let found = self.watchdog(|watchdog| {
            let holder = watchdog.holder?;
            watchdog.device.open += 1;
            Some(holder)
        });
        let Some(holder) = found else {
            return Ok(None);
        };
        let descriptor = Descriptor::new(self).map_err(HolderError::Adopt)?;
        let device = LinuxDevice::adopt(descriptor, self.world.setup.rules);
        let device = device.map_err(HolderError::Adopt)?;
        Ok(Some((Box::new(device), Box::new(self.holder(holder)))))
    }

    fn start_holder(&self, _: BorrowedFd<'_>) -> Result<Box<dyn Holder>, HolderError> {
        self.world.scheduler.preempt();
        let started = self.watchdog(|watchdog| {
            watchdog.holders += 1;
            watchdog.holder = Some(watchdog.holders);
            watchdog.device.open += 1;
            watchdog.holders
        });
        Ok(Box::new(self.holder(started)))
    }
}

impl SimulatedHost {
    fn watchdog<T>(&self, alter: impl FnOnce(&mut Watchdog) -> T) -> T {
        alter(&mut self.world.nodes()[usize::from(self.node)].watchdog)
    }

    fn holder(&self, number: u64) -> HolderProcess {
        let host = self.clone();
        HolderProcess { host, number }
    }
}

#[derive(Debug)]
struct HolderProcess {
    host: SimulatedHost,
    number: u64,
}

impl Holder for HolderProcess {
    fn is_alive(&self) -> bool {
        let number = Some(self.number);
        self.host.watchdog(|watchdog| watchdog.holder == number)
    }

    fn end(&mut self) -> Result<(), HolderError> {
        Err(HolderError::NoDescriptor)
    }
}

/// The process's descriptor of the device, closed with it.
struct Descriptor {
    host: SimulatedHost,
    boot: Initiator,
    null: File,
}

impl Descriptor {
    fn new(host: &SimulatedHost) -> io::Result<Self> {
        Ok(Self {
            host: host.clone(),
            boot: host.world.initiator(host.node),
            null: File::open("/dev/null")?,
        })
    }
}

impl Driver for Descriptor {
    fn identity(&self) -> io::Result<[u8; 32]> {
        Ok([b'i'; 32])
    }

    fn timeout(&self) -> Result<i32, Errno> {
        Ok(self.host.watchdog(|watchdog| watchdog.device.seconds))
    }

    fn set_timeout(&mut self, wanted: i32) -> Result<i32, Errno> {
        self.host.world.before_keepalive(self.host.node);
        (self.host).watchdog(|watchdog| watchdog.device.seconds = wanted);
        self.host.world.pet(self.host.node);
        Ok(wanted)
    }

    fn write(&mut self, _: &[u8]) -> io::Result<()> {
        self.host.world.before_keepalive(self.host.node);
        self.host.world.pet(self.host.node);
        Ok(())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.null.as_fd()
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        let world = &self.host.world;
        if world.is_in_boot(self.boot) {
            let (now, is_late) = (world.scheduler.now(), world.has_lapsed(self.host.node));
            self.host.watchdog(|watchdog| watchdog.close(now, is_late));
        }
    }
}

pub(crate) fn watchdog_of(node: u8) -> Group {
    Group {
        node,
        process: WATCHDOG_PID,
    }
}

/// Of every node's `bascule-watchdog`.
const WATCHDOG_PID: u32 = 2;
/// What the device has when the node boots.
const UNSET_SECONDS: i32 = 60;
/// Less than the watchdog's timeout: from the last write's end, or the return of a process, to the keepalive that
/// follows the withdrawal.
const WITHDRAWN_WITHIN: Duration = Duration::from_secs(3);
/// As in `bascule_volume::host`.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
