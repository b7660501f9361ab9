//! What a guest that has taken over its `bascule-vm` can do, tried from within that process.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use bascule_e2e::{GUEST, Network, Session, TestVm, TestVmSpec, kvm_or_skip};
use bascule_ipc::vm::{LastState, Request, VmState};

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
    assert!(tried.len() > 60, "{} attempts", tried.len());
    let done: Vec<_> = tried
        .iter()
        .filter(|(_, outcome)| outcome == "DONE")
        .collect();
    assert!(done.is_empty(), "{done:?}");
    vm.must(&Request::Stop).unwrap();
    vm.wait_stopped(SOON).unwrap();
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
