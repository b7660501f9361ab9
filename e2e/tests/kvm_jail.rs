//! What a guest that has taken over its `bascule-vm` can do, tried from within that process.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use bascule_e2e::{
    GUEST, Network, Session, TestCluster, TestVm, TestVmSpec, kvm_or_skip, wait_for,
};
use bascule_ipc::vm::{LastState, Request, VmState};
use bascule_ipc::volume::{self, Rows};
use bascule_types::{AttemptId, Bytes, Change, Epoch, NodeUid, VmUid};

const SOON: Duration = Duration::from_secs(60);

/// The attempts and what came of them, as the process logged them.
fn attempts(log: &str) -> Vec<(String, String)> {
    let lines = log.lines().filter_map(|line| line.rsplit_once("rogue: "));
    let split = lines.filter_map(|(_, rest)| {
        let (name, outcome) = rest
            .split_once(": refused: ")
            .or_else(|| rest.strip_suffix(": DONE").map(|name| (name, "DONE")))?;
        Some((name.to_owned(), outcome.to_owned()))
    });
    split.collect()
}

#[test]
fn a_guest_that_has_taken_over_its_process_finds_nothing_but_its_own() {
    if !kvm_or_skip("a_guest_that_has_taken_over_its_process_finds_nothing_but_its_own") {
        return;
    }
    let network = Network::new().unwrap();
    let run_dir = tempfile::tempdir().unwrap();
    let path = |name: &str| run_dir.path().join(name);
    let (mut others, mut listeners) = (Vec::new(), Vec::new());
    for name in ["lun", "disk", "key"] {
        fs::write(path(name), name).unwrap();
        others.push(format!("another's {name}={}", path(name).display()));
    }
    for name in ["vm.sock", "watchdog.sock"] {
        listeners.push(UnixListener::bind(path(name)).unwrap());
        others.push(format!("another's {name}={}", path(name).display()));
    }
    for host in [
        "/dev/kvm",
        "/dev/net/tun",
        "/etc/shadow",
        "/proc/1/environ",
        "/proc/1/mem",
        "/dev/mem",
        "/dev/null",
        "/",
    ] {
        others.push(format!("{host}={host}"));
    }
    let spec = TestVmSpec::probe()
        .unwrap()
        .with_options(&format!("ip={GUEST}/24 tick_ms=5"))
        .with_interface(&network.tap().unwrap())
        .with_rogue(&others.join(","));
    let mut vm = TestVm::start(&network, run_dir.path(), &spec).unwrap();
    // Nothing of it has harmed the guest.
    let mut session = Session::open(&network, GUEST, SOON).unwrap();
    session.clean_report().unwrap();
    let log = vm.log();
    assert!(log.contains("rogue: end"), "{log}");
    let attempts = attempts(&log);
    for (name, outcome) in &attempts {
        println!("{name}: {outcome}");
    }
    let (control, tried): (Vec<_>, Vec<_>) = attempts
        .iter()
        .partition(|(name, _)| name.starts_with("control"));
    assert_eq!(control.len(), 1);
    assert!(control.iter().all(|(_, outcome)| outcome == "DONE"));
    assert!(tried.len() > 65, "{} attempts", tried.len());
    let done: Vec<_> = tried
        .iter()
        .filter(|(_, outcome)| outcome == "DONE")
        .collect();
    assert!(done.is_empty(), "{done:?}");
    vm.must(&Request::Stop).unwrap();
    vm.wait_stopped(SOON).unwrap();
}

/// Two guests of different tenants on one node and one volume.
#[test]
fn a_guest_that_has_taken_over_its_process_can_do_nothing_to_a_neighbour() {
    if !kvm_or_skip("a_guest_that_has_taken_over_its_process_can_do_nothing_to_a_neighbour") {
        return;
    }
    let (cluster, node) = TestCluster::new(256).unwrap();
    let options = format!("ip={GUEST}/24 tick_ms=5 disk_ms=0 disk_slots=64");
    let spec = TestVmSpec::probe().unwrap().with_options(&options);
    let victim = cluster.install(&node, spec, 16).unwrap();
    let mut running = cluster.boot(&node, &victim, Epoch(0)).unwrap();
    let mut session = Session::open(&cluster.network, GUEST, SOON).unwrap();
    let before = node.rows().unwrap();

    let folder = running.directory().to_owned();
    let others = [
        "vm.sock",
        "vm.log",
        "console.log",
        "config.json",
        "ownership.json",
    ];
    let others = others.map(|name| format!("the neighbour's {name}={}/{name}", folder.display()));
    let spec = TestVmSpec::probe()
        .unwrap()
        .with_rogue(&others.join(","))
        .with_rogue_requests(&attacks_on(victim.uid, &before))
        .unwrap();
    let rogue = cluster.install(&node, spec, 16).unwrap();
    let mut rogue = cluster.boot(&node, &rogue, Epoch(0)).unwrap();
    let log = rogue.log();
    assert!(log.contains("rogue: end"), "{log}");
    let attempts = attempts(&log);
    let (control, tried): (Vec<_>, Vec<_>) = attempts
        .iter()
        .partition(|(name, _)| name.starts_with("control"));
    assert_eq!(control.len(), 2);
    assert!(control.iter().all(|(_, outcome)| outcome == "DONE"));
    let (requested, others): (Vec<_>, Vec<_>) = tried
        .into_iter()
        .partition(|(name, _)| name.starts_with("request "));
    for (name, outcome) in &requested {
        println!("{name}: {outcome}");
        // Not for another reason, with which it would be granted at another time.
        assert!(
            outcome.ends_with("may not request this"),
            "{name}: {outcome}"
        );
    }
    assert_eq!(requested.len(), 16);
    let done: Vec<_> = others
        .iter()
        .filter(|(_, outcome)| outcome == "DONE")
        .collect();
    assert!(done.is_empty(), "{done:?}");

    let after = node.rows().unwrap();
    let row = |rows: &Rows| rows.vms.iter().find(|row| row.vm == victim.uid).cloned();
    assert_eq!(row(&after), row(&before));
    let written = session.clean_report().unwrap().disk_ack;
    wait_for("the neighbour's disk to go on", SOON, || {
        Ok((session.clean_report()?.disk_ack > written).then_some(()))
    })
    .unwrap();
    for vm in [&mut running, &mut rogue] {
        vm.must(&Request::Stop).unwrap();
        vm.wait_stopped(SOON).unwrap();
    }
}

/// Everything that a process could request of the VM `vm`, and of the volume, to the harm of others.
fn attacks_on(vm: VmUid, rows: &Rows) -> Vec<volume::Request> {
    let row = rows.vms.iter().find(|row| row.vm == vm).unwrap();
    let (from, epoch) = (row.owner.unwrap(), row.epoch);
    let to = from;
    let disk = rows.disks.iter().find(|disk| disk.vm == Some(vm)).unwrap();
    let (disk, size, role) = (disk.disk, disk.size, disk.role);
    let name = row.name.clone();
    let (attempt, length) = (AttemptId::random(), Bytes(1));
    let changes = [
        Change::Release { vm, from, epoch },
        Change::Transfer {
            vm,
            from,
            epoch,
            to,
            attempt,
        },
        Change::TakeOver {
            vm,
            from,
            epoch,
            to,
        },
        Change::ReserveSavedState {
            vm,
            from,
            epoch,
            size,
        },
        Change::DropSavedState { vm, from, epoch },
        Change::DeleteVm { vm },
        Change::DeleteDisk { disk },
        Change::FinishImport {
            disk,
            length: Some(length),
        },
        Change::AttachDisk {
            name: name.clone(),
            vm,
        },
        Change::CreateDisk {
            vm,
            name,
            size,
            role,
            importing: false,
        },
        Change::RegisterNode {
            node: NodeUid::random(),
        },
    ];
    let what = "EIO".to_owned();
    let others = [
        volume::Request::Rows,
        volume::Request::PeekVm { vm },
        volume::Request::OpenVm {
            vm,
            owner: from,
            epoch,
            pid: 1,
        },
        volume::Request::CloseVm {
            vm,
            owner: from,
            epoch,
        },
        volume::Request::ReportFailure { vm, what },
    ];
    let changes = changes.map(volume::Request::Change);
    changes.into_iter().chain(others).collect()
}

/// It would otherwise end without a reason, or go on.
#[test]
fn a_process_that_makes_a_forbidden_call_ends_and_leaves_the_call_in_its_log_and_last_state() {
    if !kvm_or_skip(
        "a_process_that_makes_a_forbidden_call_ends_and_leaves_the_call_in_its_log_and_last_state",
    ) {
        return;
    }
    let network = Network::new().unwrap();
    let run_dir = tempfile::tempdir().unwrap();
    let spec = TestVmSpec::probe().unwrap().with_rogue("die");
    TestVm::start(&network, run_dir.path(), &spec).unwrap_err();
    let folder = fs::read_dir(run_dir.path().join("vms")).unwrap().next();
    let folder = folder.unwrap().unwrap().path();
    // ptrace(2)
    let call = "system call 101 (0x10,";
    let log = fs::read_to_string(folder.join("vm.log")).unwrap();
    assert!(log.contains(call), "{log}");
    let state = fs::read_to_string(folder.join("state.json")).unwrap();
    assert!(state.contains("Failed") && state.contains(call), "{state}");
    let parsed: LastState = serde_json::from_str(&state).unwrap();
    assert!(matches!(parsed.state, VmState::Stopped(_)));
}
