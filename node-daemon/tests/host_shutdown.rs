//! `bascule-node host-shutdown` as a process of its own, as a service unit runs it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// What `vms/<uid>` of a run directory has of a VM process, and a process that looks like it.
fn vm(run: &Path, uid: &str) -> Child {
    let folder = run.join("vms").join(uid);
    fs::create_dir_all(&folder).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", "read line"])
        .arg(folder.join("config.json"));
    let child = command.stdin(Stdio::piped()).spawn().unwrap();
    fs::write(folder.join("pid"), child.id().to_string()).unwrap();
    // Until it has executed `sh`, its command line is this program's.
    let command_line = format!("/proc/{}/cmdline", child.id());
    while !fs::read(&command_line).unwrap().starts_with(b"sh\0") {
        std::thread::yield_now();
    }
    child
}

/// The log ends before the guests do: the command ended at the first line that it could not write, and the
/// other guests were told nothing.
#[test]
fn every_guest_is_told_also_when_the_log_has_no_reader() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let uids = [
        "00000000-0000-4000-8000-000000000001",
        "00000000-0000-4000-8000-000000000002",
    ];
    let mut vms = uids.map(|uid| vm(&run, uid));
    let (reader, log) = io::pipe().unwrap();
    drop(reader);
    let shutdown = Command::new(env!("CARGO_BIN_EXE_bascule-node"))
        .arg("host-shutdown")
        .arg("--run-dir")
        .arg(&run)
        .stderr(log)
        .status()
        .unwrap();
    assert!(shutdown.success(), "{shutdown}");
    for vm in &mut vms {
        let ended = vm.try_wait().unwrap();
        assert!(ended.is_some_and(|status| !status.success()), "{ended:?}");
    }
}
