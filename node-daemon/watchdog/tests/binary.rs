//! The `bascule-watchdog` binary, with a named pipe in place of a device.
#![expect(clippy::unwrap_used, clippy::panic, reason = "fixtures of tests")]

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bascule_ipc::Connection;
use bascule_ipc::volume::WatchdogKind;
use bascule_ipc::watchdog::{Request, Response};
use bascule_types::VolumeId;
use bascule_volume_gate::boot_time_now;
use bascule_watchdog::{EnlistmentFile, EnlistmentStore as _};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::process::{Signal, kill_process};

const DEADLINE: Duration = Duration::from_secs(10);

/// Killed when the test ends, also when it fails.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn command(run_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bascule-watchdog"));
    command.arg("--run-dir").arg(run_dir).stderr(Stdio::piped());
    command
}

fn start(run_dir: &Path, arguments: &[&str]) -> Program {
    Program(command(run_dir).args(arguments).spawn().unwrap())
}

/// The stderr of a program that must refuse to start.
fn refusal(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

fn connect(run_dir: &Path) -> Connection {
    let until = boot_time_now().after(DEADLINE);
    loop {
        match Connection::connect(&run_dir.join("watchdog.sock"), DEADLINE) {
            Ok(connection) => return connection,
            Err(error) => assert!(boot_time_now() < until, "{error}"),
        }
        std::thread::yield_now();
    }
}

fn kind(run_dir: &Path) -> WatchdogKind {
    let (response, _) = connect(run_dir).call(&Request::Status).unwrap();
    match response {
        Response::Status { kind, .. } => kind,
        other @ Response::Refused { .. } => panic!("{other:?}"),
    }
}

#[test]
fn without_a_device_the_reported_kind_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let _program = start(dir.path(), &["--none"]);
    assert_eq!(kind(dir.path()), WatchdogKind::None);
}

/// Found in a node's log: two warnings a second, of the node daemon's look at whether the process listens.
#[test]
fn a_client_that_only_connects_is_not_worth_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = start(dir.path(), &["--none"]);
    assert_eq!(kind(dir.path()), WatchdogKind::None);
    for _ in 0..50 {
        drop(UnixStream::connect(dir.path().join("watchdog.sock")).unwrap());
    }
    let is_serving = || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", program.0.id())).unwrap();
        let mut names = threads
            .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
        names.any(|name| name == "client\n")
    };
    let until = boot_time_now().after(DEADLINE);
    while is_serving() {
        assert!(boot_time_now() < until, "a client is still served");
        std::thread::yield_now();
    }
    program.0.kill().unwrap();
    let mut log = String::new();
    let mut stderr = program.0.stderr.take().unwrap();
    stderr.read_to_string(&mut log).unwrap();
    assert!(!log.contains("WARN"), "{log}");
}

/// A named pipe in `run_dir`, its reader, and the arguments with which the program pets it.
fn pipe(run_dir: &Path) -> (std::fs::File, Vec<String>) {
    let pipe = run_dir.join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Reads only, so that the end of the last writer is seen.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let reader = std::fs::File::from(rustix::fs::open(&pipe, flags, Mode::empty()).unwrap());
    let pipe = pipe.to_str().unwrap().to_owned();
    let arguments = ["--pipe-timeout-ms", "60000", "--device"].map(str::to_owned);
    (reader, [&arguments[..], &[pipe]].concat())
}

/// Whether a process has the pipe open for writing.
fn is_open(reader: &mut std::fs::File) -> bool {
    let mut bytes = [0; 256];
    loop {
        match reader.read(&mut bytes) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                return true;
            }
        }
    }
}

/// Regression: the death of the process closed the device, which pets it, and the next process opened
/// it, which pets it again, whatever the lease said.
#[test]
fn i1_a_killed_process_leaves_the_device_open_and_the_next_one_adopts_it_without_a_keepalive() {
    let dir = tempfile::tempdir().unwrap();
    let (mut reader, arguments) = pipe(dir.path());
    let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
    let program = start(dir.path(), &arguments);
    assert_eq!(kind(dir.path()), WatchdogKind::Hardware);
    drop(program);
    assert!(is_open(&mut reader), "the holder has it open");

    // A volume whose gate page is gone: its lease counts as expired.
    let store = EnlistmentFile::new(dir.path().join("watchdog.json")).unwrap();
    let gone = BTreeMap::from([(VolumeId::from_bytes([1; 16]), dir.path().join("gate"))]);
    store.save(&gone).unwrap();
    let again = start(dir.path(), &arguments);
    assert_eq!(kind(dir.path()), WatchdogKind::Hardware);
    let mut byte = [0];
    let error = reader.read(&mut byte).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{byte:?}");
    drop(again);

    store.save(&BTreeMap::new()).unwrap();
    let mut last = start(dir.path(), &arguments);
    connect(dir.path())
        .call::<_, Response>(&Request::Disarm)
        .unwrap();
    assert!(last.0.wait().unwrap().success());
    let until = boot_time_now().after(DEADLINE);
    while is_open(&mut reader) {
        assert!(boot_time_now() < until, "the holder is still there");
        std::thread::yield_now();
    }
}

/// Without a holder, as after both processes were killed.
#[test]
fn i1_a_restart_without_a_valid_lease_does_not_open_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let (mut reader, arguments) = pipe(dir.path());
    let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
    let store = EnlistmentFile::new(dir.path().join("watchdog.json")).unwrap();
    let gone = BTreeMap::from([(VolumeId::from_bytes([1; 16]), dir.path().join("gate"))]);
    store.save(&gone).unwrap();
    let _program = start(dir.path(), &arguments);
    assert_eq!(kind(dir.path()), WatchdogKind::None);
    assert!(!is_open(&mut reader));
}

#[test]
fn a_killed_process_leaves_the_device_armed_and_a_disarm_request_writes_the_magic_close() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Both ends, so that the pipe outlives the programs and reads never return end of file.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut reader = std::fs::File::from(rustix::fs::open(&pipe, flags, Mode::empty()).unwrap());
    let arguments = ["--pipe-timeout-ms", "400", "--device"].map(str::to_owned);
    let arguments = [&arguments[..], &[pipe.to_str().unwrap().to_owned()]].concat();
    let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();

    let program = start(dir.path(), &arguments);
    assert_eq!(kind(dir.path()), WatchdogKind::Hardware);
    drop(program);
    let mut bytes = [0; 256];
    let read = reader.read(&mut bytes).unwrap();
    assert!(bytes[..read].iter().all(|byte| *byte == b'.'));

    let mut again = start(dir.path(), &arguments);
    connect(dir.path())
        .call::<_, Response>(&Request::Disarm)
        .unwrap();
    assert!(again.0.wait().unwrap().success());
    let read = reader.read(&mut bytes).unwrap();
    assert_eq!(bytes[..read].last(), Some(&b'V'));
}

/// A host's shutdown sends SIGTERM to all processes at once, while guests are shutting down.
#[test]
fn sigterm_ends_the_process_only_when_no_volume_is_enlisted_and_disarms_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let (mut reader, arguments) = pipe(dir.path());
    let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
    let store = EnlistmentFile::new(dir.path().join("watchdog.json")).unwrap();
    let volume = VolumeId::from_bytes([1; 16]);
    let gone = BTreeMap::from([(volume, dir.path().join("gate"))]);
    let first = start(dir.path(), &arguments);
    assert_eq!(kind(dir.path()), WatchdogKind::Hardware);
    drop(first);
    store.save(&gone).unwrap();
    let mut program = start(dir.path(), &arguments);
    assert_eq!(kind(dir.path()), WatchdogKind::Hardware);
    let pid = rustix::process::Pid::from_child(&program.0);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::TERM] {
        kill_process(pid, signal).unwrap();
        assert_eq!(kind(dir.path()), WatchdogKind::Hardware, "it still serves");
    }
    assert!(program.0.try_wait().unwrap().is_none());
    let decided_at = None;
    let withdraw = Request::Withdraw { volume, decided_at };
    connect(dir.path()).call::<_, Response>(&withdraw).unwrap();
    assert!(program.0.wait().unwrap().success());
    let until = boot_time_now().after(DEADLINE);
    while is_open(&mut reader) {
        assert!(boot_time_now() < until, "the holder is still there");
        std::thread::yield_now();
    }
}

#[test]
fn a_second_process_and_a_missing_device_are_refused_with_a_named_reason() {
    let dir = tempfile::tempdir().unwrap();
    let mut missing = command(dir.path());
    missing.args(["--device", "/nonexistent/watchdog"]);
    let refused = refusal(missing);
    assert!(
        refused.contains("open the watchdog /nonexistent/watchdog"),
        "{refused}"
    );

    let _program = start(dir.path(), &["--none"]);
    assert_eq!(kind(dir.path()), WatchdogKind::None);
    let mut second = command(dir.path());
    second.arg("--none");
    let refused = refusal(second);
    assert!(refused.contains("another bascule-watchdog"), "{refused}");
}

#[test]
fn a_damaged_list_of_enlisted_volumes_arms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("watchdog.json"), b"{").unwrap();
    let mut damaged = command(dir.path());
    damaged.arg("--none");
    let refused = refusal(damaged);
    assert!(refused.contains("watchdog.json"), "{refused}");
}
