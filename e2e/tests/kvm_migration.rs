//! Live migration between two nodes on one volume, with the probe guest, seen from outside.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use bascule_e2e::{
    Console, Flow, GUEST, Session, TestCluster, TestNode, TestVm, TestVmSpec, VmOnVolume,
    kvm_or_skip,
};
use bascule_ipc::vm::{MigrationLimits, MigrationPhase, MigrationStatus, Request, VmState};
use bascule_types::{AttemptId, Epoch};

const SOON: Duration = Duration::from_secs(30);
const VOLUME_MIB: u32 = 256;
const DISK_MIB: u32 = 16;

struct Lab {
    cluster: TestCluster,
    nodes: [TestNode; 2],
    vm: VmOnVolume,
}

/// A guest that runs somewhere, and what watches it.
struct Guest {
    vm: TestVm,
    at: usize,
    console: Console,
    session: Session,
}

impl Lab {
    fn new(options: &str) -> Self {
        let (cluster, first) = TestCluster::new(VOLUME_MIB).unwrap();
        let second = cluster.join(1, &first).unwrap();
        let options = format!("ip={GUEST}/24 disk_ms=0 disk_slots=256 {options}");
        let spec = TestVmSpec::probe().unwrap().with_options(&options);
        let vm = cluster.install(&first, spec, DISK_MIB).unwrap();
        Self {
            cluster,
            nodes: [first, second],
            vm,
        }
    }

    fn boot(&self) -> Guest {
        let mut vm = self
            .cluster
            .boot(&self.nodes[0], &self.vm, Epoch(0))
            .unwrap();
        let console = Console::new();
        console.follow(vm.console().unwrap()).unwrap();
        console.wait_line("disk last=0", SOON).unwrap();
        let session = Session::open(&self.cluster.network, GUEST, SOON).unwrap();
        Guest {
            vm,
            at: 0,
            console,
            session,
        }
    }

    fn epoch(&self) -> Epoch {
        self.nodes[0].rows().unwrap().vms[0].epoch
    }

    /// Starts the destination's process and follows its console.
    fn expect(&self, guest: &Guest, attempt: AttemptId) -> TestVm {
        let node = &self.nodes[1 - guest.at];
        let mut vm = self
            .cluster
            .expect(node, &self.vm, self.epoch(), attempt)
            .unwrap();
        guest.console.follow(vm.console().unwrap()).unwrap();
        vm
    }

    fn begin(&self, guest: &mut Guest, destination: &mut TestVm, attempt: AttemptId) {
        let peer = destination.wait_listening(SOON).unwrap();
        let to = self.nodes[1 - guest.at].owner().unwrap();
        let limits = MigrationLimits::default();
        guest
            .vm
            .must(&Request::MigrateLive {
                attempt,
                peer,
                to,
                limits,
            })
            .unwrap();
    }

    /// Moves the guest to the other node.
    fn migrate(&self, guest: &mut Guest) -> MigrationStatus {
        let attempt = AttemptId::random();
        let mut destination = self.expect(guest, attempt);
        self.begin(guest, &mut destination, attempt);
        let outcome = guest.vm.wait_migration(SOON).unwrap();
        assert_eq!(
            outcome.phase,
            MigrationPhase::Completed,
            "{outcome:?}\n{}",
            guest.vm.log()
        );
        destination.wait_state(&VmState::Running, SOON).unwrap();
        guest.vm.wait_state(&VmState::Departed, SOON).unwrap();
        guest.vm.exit(SOON).unwrap();
        guest.vm = destination;
        guest.at = 1 - guest.at;
        outcome
    }
}

impl Guest {
    fn check(&mut self) {
        self.session.count().unwrap();
        self.session.clean_report().unwrap();
        self.console.check().unwrap();
    }
}

#[test]
fn a_guest_moves_live_and_its_session_goes_on() {
    if !kvm_or_skip("a_guest_moves_live_and_its_session_goes_on") {
        return;
    }
    let lab = Lab::new("tick_ms=1 dirty=8M fill=32M");
    let mut guest = lab.boot();
    let flow = Flow::start(&lab.cluster.network, GUEST).unwrap();
    guest.console.wait_ticks(100, SOON).unwrap();
    let (before, started) = (lab.epoch(), Instant::now());
    let outcome = lab.migrate(&mut guest);
    guest.console.wait_ticks(100, SOON).unwrap();
    guest.check();
    let summary = flow.finish().unwrap();
    assert_eq!(summary.duplicated, 0, "{summary:?}");
    println!(
        "ticks {:?}, {summary:?}, {outcome:?}",
        guest.console.gap_max(started)
    );
    assert_eq!(lab.epoch(), before.next());
    let row = lab.nodes[0].rows().unwrap().vms.remove(0);
    assert_eq!(row.owner, Some(lab.nodes[1].owner().unwrap()));
}

#[test]
fn twenty_migrations_back_and_forth() {
    if !kvm_or_skip("twenty_migrations_back_and_forth") {
        return;
    }
    let lab = Lab::new("tick_ms=5 dirty=16M rate=16M fill=32M");
    let mut guest = lab.boot();
    for count in 1..=20 {
        let acknowledged = guest.session.clean_report().unwrap().disk_ack;
        lab.migrate(&mut guest);
        guest.check();
        bascule_e2e::wait_for("the disk to go on", SOON, || {
            Ok((guest.session.clean_report()?.disk_ack > acknowledged).then_some(()))
        })
        .unwrap();
        assert_eq!(lab.epoch(), Epoch(count + 1));
    }
}

#[test]
fn a_destination_that_dies_leaves_the_guest_unharmed_and_movable() {
    if !kvm_or_skip("a_destination_that_dies_leaves_the_guest_unharmed_and_movable") {
        return;
    }
    let lab = Lab::new("tick_ms=5 dirty=16M fill=64M");
    let mut guest = lab.boot();
    guest.console.wait_line("memory filled", SOON).unwrap();
    let attempt = AttemptId::random();
    let mut destination = lab.expect(&guest, attempt);
    lab.begin(&mut guest, &mut destination, attempt);
    destination.process().kill().unwrap();
    let outcome = guest.vm.wait_migration(SOON).unwrap();
    assert_eq!(outcome.phase, MigrationPhase::Failed, "{outcome:?}");
    assert_eq!(guest.vm.status().unwrap().state, VmState::Running);
    guest.console.wait_ticks(20, SOON).unwrap();
    guest.check();
    lab.migrate(&mut guest);
    guest.check();
}
