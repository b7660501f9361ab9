//! `bascule-vm` as `bascule-node` uses it: a configuration file, and requests over `vm.sock`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the whole file is a test, its helpers too"
)]

#[expect(dead_code, reason = "the machine's own tests use the rest")]
#[path = "../src/testing/guests.rs"]
mod guests;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bascule_ipc::vm::{
    Boot, DiskConfig, DiskSource, ImageSource, Panic, PanicStatus, ProcessUser, Request,
    ResetCause, Response, StartMode, StopReason, VmConfig, VmState, VmStatus,
};
use bascule_ipc::{Connection, Kind};
use bascule_types::{Bytes, OnPanic, UserRange, VmUid};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Poll interval of the status: polling without a pause would slow the process under test.
const POLL: Duration = Duration::from_millis(2);

struct TestProcess {
    child: Child,
    control: Connection,
    dir: TempDir,
    /// The states that were seen before it stopped.
    shown: Vec<VmState>,
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

fn config(dir: &TempDir, code: &[u8]) -> VmConfig {
    let path = dir.path().join("kernel");
    std::fs::write(&path, guests::elf(code)).unwrap();
    VmConfig {
        version: VmConfig::VERSION,
        uid: VmUid::random(),
        name: "default/test".to_owned(),
        cpus: 1,
        memory: Bytes::mib(16),
        boot: Boot {
            kernel: ImageSource::File { path },
            initrd: None,
            cmdline: String::new(),
        },
        disks: Vec::new(),
        interfaces: Vec::new(),
        home: None,
        start: StartMode::Boot,
        tls_dir: None,
        shutdown_timeout_ms: None,
        cloud_init: None,
        user: None,
        guest_agent: false,
        on_panic: OnPanic::default(),
    }
}

impl TestProcess {
    fn running(code: &[u8]) -> Self {
        Self::configured(code, |_| {})
    }

    fn configured(code: &[u8], change: impl FnOnce(&mut VmConfig)) -> Self {
        let dir = TempDir::new().unwrap();
        let mut config = config(&dir, code);
        change(&mut config);
        let mut vm = Self::start(dir, &config);
        let deadline = Instant::now() + ANSWER_LIMIT;
        while vm.status().state == VmState::Starting {
            assert!(Instant::now() < deadline, "still starting");
            std::thread::park_timeout(POLL);
        }
        vm
    }

    fn start(dir: TempDir, config: &VmConfig) -> Self {
        let path = dir.path().join("config.json");
        std::fs::write(&path, serde_json::to_vec(config).unwrap()).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_bascule-vm"))
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let socket = dir.path().join("vm.sock");
        let deadline = Instant::now() + ANSWER_LIMIT;
        let control = loop {
            match Connection::connect(&socket, ANSWER_LIMIT) {
                Ok(control) => break control,
                Err(error) => assert!(
                    Instant::now() < deadline && error.kind() == Kind::Gone,
                    "no vm.sock: {error}; process: {:?}",
                    child.try_wait()
                ),
            }
            std::thread::yield_now();
        };
        Self {
            child,
            control,
            dir,
            shown: Vec::new(),
        }
    }

    fn ask(&mut self, request: &Request) -> Response {
        self.control.call(request).unwrap().0
    }

    fn accepted(&mut self, request: &Request) {
        assert_eq!(self.ask(request), Response::Accepted);
    }

    fn refused(&mut self, request: &Request) -> String {
        match self.ask(request) {
            Response::Refused { reason } => reason,
            other => panic!("not refused: {other:?}"),
        }
    }

    fn status(&mut self) -> VmStatus {
        match self.ask(&Request::Status) {
            Response::Status(status) => *status,
            other => panic!("no status: {other:?}"),
        }
    }

    fn await_stopped(&mut self) -> StopReason {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let status = self.status();
            if let VmState::Stopped(reason) = status.state {
                return reason;
            }
            self.shown.push(status.state.clone());
            assert!(Instant::now() < deadline, "still {:?}", status.state);
            std::thread::park_timeout(POLL);
        }
    }

    fn await_resets(&mut self, count: u32) -> VmStatus {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let status = self.status();
            if status.resets.count >= count {
                return status;
            }
            assert!(Instant::now() < deadline, "{:?}", status.resets);
            std::thread::park_timeout(POLL);
        }
    }

    fn console_log(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("console.log")).unwrap()
    }

    fn await_console(&self, count: usize) {
        let deadline = Instant::now() + ANSWER_LIMIT;
        while self.console_log().len() < count {
            assert!(Instant::now() < deadline, "no {count} bytes on the console");
            std::thread::yield_now();
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// The process exits cleanly, and its last state is that of a guest that was stopped on request.
    fn ends_on_request(mut self) {
        assert!(self.child.wait().unwrap().success());
        let state = std::fs::read_to_string(self.dir.path().join("state.json")).unwrap();
        assert!(state.contains("\"Requested\""), "{state}");
    }

    fn exits(mut self) {
        self.accepted(&Request::Exit);
        assert!(self.child.wait().unwrap().success());
    }
}

fn kvm_or_skip() -> bool {
    let present = std::path::Path::new("/dev/kvm").exists();
    assert!(
        present || std::env::var_os("CI").is_none(),
        "/dev/kvm is missing"
    );
    if !present {
        println!("skipped: /dev/kvm is missing");
    }
    present
}

#[test]
fn a_guest_runs_is_paused_resumed_and_stopped_over_the_control_socket() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::COUNTER);
    assert_eq!(vm.status().state, VmState::Running);
    vm.await_console(50);
    vm.accepted(&Request::Pause);
    assert_eq!(vm.status().state, VmState::Paused);
    let standing = vm.console_log().len();
    assert_eq!(vm.refused(&Request::Pause), "the guest is paused");
    assert_eq!(vm.refused(&Request::Exit), "the guest is paused");
    assert_eq!(vm.console_log().len(), standing);
    vm.accepted(&Request::Resume);
    vm.await_console(standing + 50);
    let waiting = vm.ask(&Request::WaitsFor);
    assert_eq!(waiting, Response::WaitsFor(None));
    vm.accepted(&Request::Stop);
    assert_eq!(vm.await_stopped(), StopReason::Requested);
    let state = std::fs::read_to_string(vm.dir.path().join("state.json")).unwrap();
    assert!(state.contains("\"Requested\""), "{state}");
    vm.exits();
}

/// `bascule-node` starts it as root.
#[test]
fn no_thread_of_a_running_guests_process_has_a_capability_or_another_user() {
    if !kvm_or_skip() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut config = config(&dir, guests::COUNTER);
    let root = rustix::process::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "CI needs root");
    if root {
        // As `bascule-node` makes it for a process with a user of its own.
        let (id, groups) = (
            UserRange::VMS.shared_group() + 7,
            vec![UserRange::VMS.shared_group()],
        );
        std::os::unix::fs::chown(dir.path(), None, Some(id)).unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o1770)).unwrap();
        config.user = Some(ProcessUser { id, groups });
    }
    let mut vm = TestProcess::start(dir, &config);
    vm.await_console(50);
    let process = std::path::PathBuf::from(format!("/proc/{}", vm.child.id()));
    let threads = std::fs::read_dir(process.join("task")).unwrap();
    let mut seen = 0;
    for thread in threads {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        for none in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let line = format!("\n{none}:\t0000000000000000\n");
            assert!(status.contains(&line), "{status}");
        }
        assert!(status.contains("\nNoNewPrivs:\t1\n"), "{status}");
        if let Some(ProcessUser { id, groups }) = &config.user {
            for line in [
                format!("\nUid:\t{id}\t{id}\t{id}\t{id}\n"),
                format!("\nGid:\t{id}\t{id}\t{id}\t{id}\n"),
                format!("\nGroups:\t{} \n", groups[0]),
            ] {
                assert!(status.contains(&line), "{line:?} in {status}");
            }
        }
        seen += 1;
    }
    assert!(seen > 2, "it has threads for its vCPU and its devices");
    let limits = std::fs::read_to_string(process.join("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let values: Vec<_> = core.unwrap().split_whitespace().skip(4).take(2).collect();
    assert_eq!(values, ["0", "0"]);
    vm.accepted(&Request::Stop);
    vm.exits();
}

#[test]
fn a_guest_that_switches_itself_off_leaves_its_reason_in_the_status() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::POWER_OFF);
    assert_eq!(vm.await_stopped(), StopReason::GuestShutdown);
    assert_eq!(vm.refused(&Request::PowerButton), "the guest is stopped");
    vm.exits();
}

#[test]
fn a_guest_that_resets_itself_boots_again_in_its_process_and_waits_when_it_does_so_too_often() {
    if !kvm_or_skip() {
        return;
    }
    for (code, cause) in [
        (guests::RESET, ResetCause::Guest),
        (guests::TRIPLE_FAULT, ResetCause::TripleFault),
    ] {
        let mut vm = TestProcess::running(code);
        let pid = vm.status().pid;
        let status = vm.await_resets(5);
        assert_eq!((status.pid, status.state), (pid, VmState::Running));
        assert_eq!(status.resets.last, Some(cause));
        let deadline = Instant::now() + ANSWER_LIMIT;
        while vm.status().resets.waits.is_none() {
            assert!(Instant::now() < deadline, "it does not wait");
            std::thread::park_timeout(POLL);
        }
        // It can be stopped meanwhile.
        vm.accepted(&Request::Stop);
        assert_eq!(vm.await_stopped(), StopReason::Requested);
        vm.exits();
    }
}

#[test]
fn a_guest_that_panics_is_reset_or_left_as_it_is_and_its_output_is_kept() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::PANIC);
    let pid = vm.status().pid;
    let status = vm.await_resets(3);
    assert_eq!((status.pid, status.state), (pid, VmState::Running));
    assert!(status.panics.count >= 3, "{:?}", status.panics);
    let boots = vm
        .console_log()
        .iter()
        .filter(|byte| **byte == b'3')
        .count();
    assert!(boots >= 3, "each has printed what its device knows");
    vm.accepted(&Request::Stop);
    assert_eq!(vm.await_stopped(), StopReason::Requested);
    assert!(vm.status().panics.count >= 3);
    vm.exits();

    let mut vm = TestProcess::configured(guests::PANIC, |config| config.on_panic = OnPanic::Leave);
    vm.await_console(100);
    vm.await_console(vm.console_log().len() + 100);
    let status = vm.status();
    let present = Some(Panic::Panicked);
    assert_eq!(status.panics, PanicStatus { count: 1, present });
    assert_eq!((status.resets.count, status.state), (0, VmState::Running));
    vm.accepted(&Request::Reset);
    vm.await_resets(1);
    vm.accepted(&Request::Stop);
    assert_eq!(vm.await_stopped(), StopReason::Requested);
    vm.exits();
}

#[test]
fn a_machine_is_reset_over_the_control_socket() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::COUNTER);
    vm.await_console(50);
    vm.accepted(&Request::Reset);
    let status = vm.await_resets(1);
    assert_eq!(status.resets.last, Some(ResetCause::Requested));
    vm.await_console(vm.console_log().len() + 50);
    let log = vm.console_log();
    // The first letter of each boot is the second of the alphabet.
    let goes_on = |pair: &&[u8]| pair[1] == pair[0] + 1 || **pair == *b"pa";
    let breaks = log.windows(2).filter(|pair| !goes_on(pair)).count();
    assert!(breaks <= 1, "{}", String::from_utf8_lossy(&log));
    assert_eq!(log[0], b'b');
    assert_eq!(vm.status().resets.count, 1);
    vm.accepted(&Request::Stop);
    assert_eq!(vm.refused(&Request::Reset), "the guest is stopped");
    vm.exits();
}

#[test]
fn the_power_button_is_pressed_over_the_control_socket() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::AWAIT_BUTTON);
    vm.accepted(&Request::PowerButton);
    assert_eq!(vm.await_stopped(), StopReason::GuestShutdown);
    vm.exits();
}

/// A host's shutdown sends SIGTERM to every process, and again after a while.
#[test]
fn sigterm_presses_the_power_button_and_the_process_exits_when_the_guest_is_off() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::AWAIT_BUTTON);
    vm.signal(Signal::HUP);
    assert_eq!(vm.status().state, VmState::Running);
    vm.signal(Signal::TERM);
    vm.ends_on_request();
    // A guest that was paused on request can react, too.
    let mut vm = TestProcess::running(guests::AWAIT_BUTTON);
    vm.accepted(&Request::Pause);
    vm.signal(Signal::INT);
    vm.ends_on_request();
}

#[test]
fn a_guest_that_ignores_the_power_button_is_stopped_when_its_time_is_up() {
    if !kvm_or_skip() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut config = config(&dir, guests::COUNTER);
    config.shutdown_timeout_ms = Some(300);
    let vm = TestProcess::start(dir, &config);
    vm.await_console(50);
    for signal in [Signal::TERM, Signal::TERM, Signal::INT, Signal::HUP] {
        vm.signal(signal);
    }
    vm.ends_on_request();
}

/// Nothing is lost: the guest was never started.
#[test]
fn a_process_that_could_not_build_its_machine_exits_on_sigterm() {
    if !kvm_or_skip() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut config = config(&dir, guests::COUNTER);
    config.cpus = 0;
    let mut vm = TestProcess::start(dir, &config);
    vm.await_stopped();
    vm.signal(Signal::TERM);
    assert!(vm.child.wait().unwrap().success());
}

#[test]
fn the_console_is_a_stream_in_both_directions_and_a_later_one_takes_over() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::ECHO);
    let mut attach = || {
        let (response, fds): (Response, _) = vm.control.call(&Request::Console).unwrap();
        assert_eq!(response, Response::Accepted);
        UnixStream::from(fds.into_iter().next().unwrap())
    };
    let mut first = attach();
    first.write_all(b"hello").unwrap();
    let mut echoed = [0; 5];
    first.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"hello");
    let mut second = attach();
    second.write_all(b"!").unwrap();
    let mut seen = [0; 6];
    second.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello!", "the past, then the present");
}

#[test]
fn a_guest_outlives_every_control_connection_and_garbage_on_the_socket() {
    if !kvm_or_skip() {
        return;
    }
    let mut vm = TestProcess::running(guests::COUNTER);
    let socket = vm.dir.path().join("vm.sock");
    for garbage in [
        b"\xFF\xFF\xFF\xFF".as_slice(),
        b"\x02\0\0\0{]",
        b"",
        b"\x01",
    ] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(garbage).unwrap();
    }
    vm.control = Connection::connect(&socket, ANSWER_LIMIT).unwrap();
    assert_eq!(vm.status().state, VmState::Running);
    let printed = vm.console_log().len();
    vm.await_console(printed + 50);
    assert_eq!(vm.refused(&Request::Exit), "the guest is running");
}

#[test]
fn a_failed_build_names_the_field_and_the_process_stays_to_report_it() {
    if !kvm_or_skip() {
        return;
    }
    type Spoil = fn(&mut VmConfig);
    let cases: [(Spoil, &str); 5] = [
        (|config| config.cpus = 0, "cpus: 0"),
        (|config| config.memory = Bytes(u64::MAX), "memory: "),
        (
            |config| {
                config.boot.kernel = ImageSource::File {
                    path: "/nowhere".into(),
                }
            },
            "boot.kernel: open /nowhere",
        ),
        (
            |config| config.boot.cmdline = "x".repeat(4096),
            "boot.cmdline: ",
        ),
        (
            |config| {
                let source = DiskSource::File {
                    path: "/nowhere".into(),
                    read_only: false,
                };
                config.disks.push(DiskConfig {
                    name: "data".into(),
                    source,
                    on_error: bascule_types::OnError::Report,
                });
            },
            "disks: \"data\": open /nowhere",
        ),
    ];
    for (spoil, expected) in cases {
        let dir = TempDir::new().unwrap();
        let mut config = config(&dir, guests::COUNTER);
        spoil(&mut config);
        let mut vm = TestProcess::start(dir, &config);
        match vm.await_stopped() {
            StopReason::Failed { what } => assert!(what.starts_with(expected), "{what}"),
            other => panic!("{other:?}"),
        }
        // No other state may be shown, because a client that waits for the start would take it for success.
        vm.shown.retain(|state| *state != VmState::Starting);
        assert_eq!(vm.shown, []);
        vm.exits();
    }
}
