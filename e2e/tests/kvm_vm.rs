//! One `bascule-vm` by itself, with the probe guest, without a volume.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use bascule_e2e::{Console, Flow, GUEST, Network, Session, TestVm, TestVmSpec, kvm_or_skip};
use bascule_ipc::vm::{Request, Response, StopReason, VmState};

const SOON: Duration = Duration::from_secs(20);

struct Lab {
    network: Network,
    directory: tempfile::TempDir,
}

struct Running {
    vm: TestVm,
    console: Console,
    session: Session,
}

impl Lab {
    fn new() -> Self {
        Self {
            network: Network::new().unwrap(),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn disk(&self) -> PathBuf {
        let path = self.directory.path().join("disk.img");
        if !path.exists() {
            File::create(&path).unwrap().set_len(64 << 20).unwrap();
        }
        path
    }

    fn spec(&self, options: &str) -> TestVmSpec {
        let tap = self.network.tap().unwrap();
        let options = format!("ip={GUEST}/24 {options}");
        let spec = TestVmSpec::probe().unwrap().with_options(&options);
        spec.with_interface(&tap).with_disk(&self.disk())
    }

    fn boot(&self, spec: &TestVmSpec) -> Running {
        let mut vm = TestVm::start(&self.network, self.directory.path(), spec).unwrap();
        let console = Console::new();
        console.follow(vm.console().unwrap()).unwrap();
        console.wait_line("disk last=", SOON).unwrap();
        let session = Session::open(&self.network, GUEST, SOON).unwrap();
        Running {
            vm,
            console,
            session,
        }
    }
}

impl Running {
    fn check(&mut self) {
        self.session.count().unwrap();
        self.session.clean_report().unwrap();
        self.console.check().unwrap();
    }
}

#[test]
fn a_guest_boots_and_its_network_disk_and_memory_are_sound() {
    if !kvm_or_skip("a_guest_boots_and_its_network_disk_and_memory_are_sound") {
        return;
    }
    let lab = Lab::new();
    let mut guest = lab.boot(&lab.spec("disk_ms=0 dirty=16M fill=32M"));
    assert_eq!(guest.vm.status().unwrap().state, VmState::Running);
    let flow = Flow::start(&lab.network, GUEST).unwrap();
    for _ in 0..200 {
        guest.session.count().unwrap();
    }
    guest.console.wait_ticks(50, SOON).unwrap();
    let summary = flow.finish().unwrap();
    assert!(summary.received > 100, "{summary:?}");
    assert_eq!((summary.duplicated, summary.lost), (0, 0), "{summary:?}");
    let report = guest.session.clean_report().unwrap();
    assert!(report.disk_ack > 10 && report.mem_pages > 4096, "{report}");
    guest.check();
}

#[test]
fn a_machine_without_devices_boots_ticks_and_obeys_its_power_button() {
    if !kvm_or_skip("a_machine_without_devices_boots_ticks_and_obeys_its_power_button") {
        return;
    }
    let lab = Lab::new();
    let spec = TestVmSpec::probe()
        .unwrap()
        .with_options("dirty=16M fill=16M");
    let mut vm = TestVm::start(&lab.network, lab.directory.path(), &spec).unwrap();
    let console = Console::new();
    console.follow(vm.console().unwrap()).unwrap();
    console.wait_ticks(20, SOON).unwrap();
    vm.must(&Request::PowerButton).unwrap();
    console.wait_line("power button", SOON).unwrap();
    assert_eq!(vm.wait_stopped(SOON).unwrap(), StopReason::GuestShutdown);
    console.check().unwrap();
    assert!(vm.exit(SOON).unwrap().success());
}

#[test]
fn the_power_button_and_the_guest_itself_switch_it_off() {
    if !kvm_or_skip("the_power_button_and_the_guest_itself_switch_it_off") {
        return;
    }
    let lab = Lab::new();
    let mut guest = lab.boot(&lab.spec(""));
    guest.vm.must(&Request::PowerButton).unwrap();
    guest.console.wait_line("power button", SOON).unwrap();
    assert_eq!(
        guest.vm.wait_stopped(SOON).unwrap(),
        StopReason::GuestShutdown
    );
    assert!(guest.vm.exit(SOON).unwrap().success());

    let mut guest = lab.boot(&lab.spec(""));
    guest.session.command("poweroff").unwrap();
    assert_eq!(
        guest.vm.wait_stopped(SOON).unwrap(),
        StopReason::GuestShutdown
    );
}

#[test]
fn a_lost_control_connection_stops_no_guest() {
    if !kvm_or_skip("a_lost_control_connection_stops_no_guest") {
        return;
    }
    let lab = Lab::new();
    let mut guest = lab.boot(&lab.spec("disk_ms=1"));
    let pid = guest.vm.process().pid();
    for _ in 0..3 {
        guest.vm.reconnect().unwrap();
        guest.check();
    }
    let status = guest.vm.status().unwrap();
    assert_eq!((status.state, status.pid), (VmState::Running, pid));
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    if !kvm_or_skip("a_paused_guest_stands_still_and_goes_on_where_it_was") {
        return;
    }
    let lab = Lab::new();
    let mut guest = lab.boot(&lab.spec("tick_ms=5 disk_ms=0 dirty=8M"));
    for _ in 0..5 {
        guest.console.wait_ticks(10, SOON).unwrap();
        guest.vm.must(&Request::Pause).unwrap();
        guest.vm.wait_state(&VmState::Paused, SOON).unwrap();
        let ticks = guest.console.ticks().len();
        assert_eq!(guest.vm.status().unwrap().state, VmState::Paused);
        // What was on its way to the console may still arrive; a running guest ticks much more.
        assert!(guest.console.ticks().len() <= ticks + 2);
        guest.vm.must(&Request::Resume).unwrap();
        guest.vm.wait_state(&VmState::Running, SOON).unwrap();
    }
    guest.check();
}

#[test]
fn killed_at_any_moment_it_has_every_acknowledged_block() {
    if !kvm_or_skip("killed_at_any_moment_it_has_every_acknowledged_block") {
        return;
    }
    let lab = Lab::new();
    for _ in 0..3 {
        let spec = lab.spec("disk_ms=0 disk_slots=64");
        let mut guest = lab.boot(&spec);
        guest.console.wait_ticks(10, SOON).unwrap();
        guest.vm.process().kill().unwrap();
        let acknowledged = guest.console.disk_ack();
        assert!(acknowledged > 0);

        let mut guest = lab.boot(&lab.spec("disk_ms=0 disk_slots=64"));
        let report = guest.session.clean_report().unwrap();
        assert!(
            report.disk_start >= acknowledged,
            "{report}, acknowledged {acknowledged}"
        );
        guest.vm.process().kill().unwrap();
    }
}

#[test]
fn what_a_running_guest_does_not_allow_is_refused_and_harms_nothing() {
    if !kvm_or_skip("what_a_running_guest_does_not_allow_is_refused_and_harms_nothing") {
        return;
    }
    let lab = Lab::new();
    let mut guest = lab.boot(&lab.spec(""));
    for request in [Request::Exit, Request::Resume] {
        let response = guest.vm.ask(&request).unwrap();
        assert!(
            matches!(response, Response::Refused { .. }),
            "{request:?}: {response:?}"
        );
    }
    guest.check();
}
