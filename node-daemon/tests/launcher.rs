//! `bascule-node launch` as a process of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

/// What is written to the launcher's standard input, and read from the program's.
fn read_by_program(options: &[&str], input: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let read = folder.path().join("read");
    let mut launcher = Command::new(env!("CARGO_BIN_EXE_bascule-node"))
        .arg("launch")
        .arg("--stderr")
        .arg(folder.path().join("log"))
        .args(options)
        .args(["--", "/bin/sh", "-c", "cat >\"$0\""])
        .arg(&read)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = launcher.stdin.take().unwrap();
    // A program without standard input does not read the pipe, and may have ended.
    let written = pipe.write_all(input.as_bytes());
    assert!(written.is_ok() || options.is_empty(), "{written:?}");
    drop(pipe);
    let end = launcher.wait().unwrap();
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(end.success(), "{log}");
    fs::read_to_string(read).unwrap()
}

/// A container whose streams are still open hangs in Terminating; a secret for the program comes on its input.
#[test]
fn a_program_reads_the_launchers_standard_input_only_where_it_is_meant_to() {
    assert_eq!(
        read_by_program(&["--stdin"], "Bearer hunter2"),
        "Bearer hunter2"
    );
    assert_eq!(read_by_program(&[], "Bearer hunter2"), "");
}
