//! A storage that stalls longer than the lease and the watchdog's timeout, with the real
//! `bascule-watchdog` on a device of the test.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bascule_ipc::volume::Response;
use bascule_ipc::{Connection, watchdog};
use bascule_types::{BootTime, VmRow};
use bascule_volume_gate::{GateClosedReason, GateReader, LinuxClock, WriterPage, boot_time_now};
use bascule_volume_protocol::Rules;
use bascule_watchdog::keepalive::{self, Shared, Slot};
use bascule_watchdog::{EnlistedVolumes, EnlistmentFile, Kind, WatchdogDevice, server};

use crate::lab::{Lab, Node, TIMEOUT};

/// What the volume's times admit.
const DEVICE_TIMEOUT: Duration = Duration::from_millis(1500);

/// Keeps the time of the last keepalive.
struct Device(Arc<Mutex<BootTime>>);

impl WatchdogDevice for Device {
    fn kind(&self) -> Kind {
        Kind::Hardware
    }

    fn timeout(&self) -> Duration {
        DEVICE_TIMEOUT
    }

    fn keepalive(&mut self) -> io::Result<()> {
        let mut petted_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *petted_at = boot_time_now();
        Ok(())
    }

    fn disarm(&mut self) -> io::Result<()> {
        Err(io::Error::other("not in this test"))
    }
}

/// One node with one writer, this process, and its watchdog.
struct Stall {
    lab: Lab,
    one: Node,
    row: VmRow,
    gate: GateReader,
    page: WriterPage,
    petted_at: Arc<Mutex<BootTime>>,
}

impl Stall {
    fn new() -> Self {
        let lab = Lab::without_watchdog("watchdog");
        let petted_at = start_watchdog(&lab);
        let one = lab.start(1);
        let row = one.create_and_own(1);
        let (opened, fds) = one.open_vm(&row);
        assert!(matches!(opened, Response::Opened(_)), "{opened:?}");
        let mut fds = fds.into_iter().skip(1);
        let gate = GateReader::from_fd(fds.next().unwrap()).unwrap();
        let page = WriterPage::attach(fds.next().unwrap()).unwrap();
        Self {
            lab,
            one,
            row,
            gate,
            page,
            petted_at,
        }
    }

    /// Makes the storage fail, and returns when the lease of the writer has ended.
    fn lapses(&self) -> BootTime {
        self.one.fail_heartbeats(&self.lab, true);
        let owner = self.row.owner.unwrap();
        let closed = |_: &Node| match self.gate.check(boot_time_now(), owner).ok() {
            Some(()) => None,
            None => Some(self.gate.view().expiry),
        };
        self.one.wait("the lease to end", closed, |_| true)
    }

    /// The number of volumes that `bascule-watchdog` watches.
    fn enlisted(&self) -> usize {
        let mut client = Connection::connect(&self.lab.watchdog_sock(), TIMEOUT).unwrap();
        match client.call(&watchdog::Request::Status).unwrap().0 {
            watchdog::Response::Status { enlisted, .. } => enlisted.len(),
            refused @ watchdog::Response::Refused { .. } => panic!("{refused:?}"),
        }
    }

    fn petted_at(&self) -> BootTime {
        *self.petted_at.lock().unwrap()
    }

    /// Waits until the device has had a keepalive after `moment`.
    fn wait_for_keepalive(&self, moment: BootTime) {
        let petted = |_: &Node| Some(self.petted_at());
        self.one
            .wait("a keepalive", petted, |petted| *petted > moment);
    }

    /// Waits until a device would have reset the node.
    fn wait_for_reset(&self) {
        let silent = |_: &Node| Some(boot_time_now().since(self.petted_at()));
        self.one
            .wait("the reset", silent, |silent| *silent > DEVICE_TIMEOUT);
    }
}

fn start_watchdog(lab: &Lab) -> Arc<Mutex<BootTime>> {
    let socket = lab.watchdog_sock();
    let store = EnlistmentFile::new(socket.with_extension("json")).unwrap();
    let volumes = EnlistedVolumes::load(Box::new(store), Rules::ENFORCED).unwrap();
    let petted_at = Arc::new(Mutex::new(boot_time_now()));
    let device = Device(Arc::clone(&petted_at));
    let shared = Shared::new(Some(&device), volumes, Arc::new(LinuxClock));
    let listener = server::listen(&socket).unwrap();
    let served = Arc::clone(&shared);
    // The threads end with the test process.
    let spawn = |name: &str| std::thread::Builder::new().name(name.to_owned());
    spawn("server")
        .spawn(move || server::serve(&listener, &served))
        .unwrap();
    spawn("keepalive")
        .spawn(move || {
            let slot: Slot<Device, fn() -> io::Result<Device>> = Slot::Open(device);
            keepalive::run(slot, &shared).unwrap();
        })
        .unwrap();
    petted_at
}

/// Every node with an open writer used to be reset when the storage stalled for longer than the lease and
/// the watchdog's timeout, also when it had nothing in flight.
#[test]
fn a_node_whose_writes_are_complete_is_not_reset_by_a_stall_and_writes_again_after_it() {
    let mut stall = Stall::new();
    let row = stall.one.create_and_own(2);
    assert_eq!(stall.enlisted(), 1);
    let ended = stall.lapses();
    stall.wait_for_keepalive(ended);
    assert_eq!(stall.enlisted(), 0, "withdrawn");
    // A writer that is not drained must not come meanwhile.
    let (refused, _) = stall.one.open_vm(&row);
    let Response::Unavailable { reason } = refused else {
        panic!("{refused:?}");
    };
    assert!(reason.contains("try again"), "{reason}");
    stall.wait_for_keepalive(ended.after(DEVICE_TIMEOUT));
    let before = stall.row.owner.unwrap();
    let closed = stall.gate.check(boot_time_now(), before).unwrap_err();
    assert!(
        matches!(closed.reason, GateClosedReason::Expired { .. }),
        "{closed}"
    );

    stall.one.fail_heartbeats(&stall.lab, false);
    let now = stall.one.wait_open().owner.unwrap();
    assert_eq!(now.generation, before.generation.next());
    stall.gate.check(boot_time_now(), now).unwrap();
    assert_eq!(stall.enlisted(), 1, "enlisted before the gate opened");
    let open = |one: &Node| matches!(one.open_vm(&one.row(2)).0, Response::Opened(_)).then_some(());
    stall.one.wait("the other VM to open", open, |()| true);
}

#[test]
fn i1_a_node_with_a_write_in_flight_is_reset_and_one_whose_write_completes_in_time_is_not() {
    let stall = Stall::new();
    stall.page.write_begins();
    stall.lapses();
    stall.wait_for_reset();
    assert_eq!(stall.enlisted(), 1);
    stall.page.writes_ended();
    stall.wait_for_keepalive(boot_time_now());
    assert_eq!(stall.enlisted(), 0);
}

#[test]
fn i1_a_node_with_a_failed_write_is_reset_when_its_lease_lapses() {
    let stall = Stall::new();
    stall.page.write_begins();
    stall.page.write_failed();
    stall.page.writes_ended();
    stall.lapses();
    stall.wait_for_reset();
    assert_eq!(stall.enlisted(), 1);
}
