//! The unpacker as a process of its own: what it may do, and what it says of a bad image.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};

/// A zstd file of one byte: a frame with a window of 2 MiB and a block without compression (RFC 8878, section 3.1.1).
const FILE: &[u8] = b"\x28\xb5\x2f\xfd\0\x58\x09\0\0x";

fn start(format: &str, input: Stdio) -> Child {
    let parent = std::process::id().to_string();
    Command::new(env!("CARGO_BIN_EXE_bascule-import"))
        .args(["unpack", "--parent", &parent, format])
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn unpack(format: &str, image: &[u8]) -> Output {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(image).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    start(format, file.into()).wait_with_output().unwrap()
}

/// A fault in a library that reads hostile bytes would otherwise be one in a process with rights.
#[test]
fn an_unpacker_can_open_nothing_and_has_bounded_memory() {
    let mut unpacker = start("zstd", Stdio::piped());
    let mut input = unpacker.stdin.take().unwrap();
    input.write_all(FILE).unwrap();
    // It has begun to read what may be hostile, and waits for more.
    let mut first = [0];
    let mut output = unpacker.stdout.take().unwrap();
    output.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"x");
    let about = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", unpacker.id())).unwrap();
    let limit = |name: &str| {
        let limits = about("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let words: Vec<_> = line.unwrap().split_whitespace().take(2).collect();
        words.join(" ")
    };
    // Neither a file nor a socket, by the soft and the hard limit.
    assert_eq!(limit("Max open files"), "0 0");
    assert_eq!(limit("Max address space"), "1073741824 1073741824");
    assert!(about("status").contains("NoNewPrivs:\t1"));
    drop(input);
    assert!(unpacker.wait().unwrap().success());
}

#[test]
fn a_bad_image_is_refused_for_good_and_the_text_says_what_is_wrong() {
    let mut backed = vec![0; 1 << 18];
    backed[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    backed[15] = 200;
    backed[23] = 16;
    for (format, image, says) in [
        ("qcow2", &backed[..], "the qcow2 image has a backing file"),
        ("qcow2", &backed[..50], "is truncated: it has 50 bytes"),
        ("zstd", &FILE[..9], "the zstd file is damaged: "),
        ("gzip", b"\x1f\x8b\x08\0", "the gzip file is truncated"),
        ("gzip", b"no gzip file at all", "the gzip file is damaged: "),
        ("xz", b"\xfd7zXZ\0\0\0garbage!", "the xz file is damaged: "),
    ] {
        let output = unpack(format, image);
        let said = String::from_utf8_lossy(&output.stderr);
        // `images::FINAL_STATUS`.
        assert_eq!(output.status.code(), Some(3), "{format}: {said}");
        assert!(said.contains(says), "{said}");
    }
    let output = unpack("zstd", FILE);
    assert!(output.status.success());
    assert_eq!(output.stdout, b"x");
}

#[test]
fn an_unpacker_whose_import_has_ended_reads_nothing() {
    let output = Command::new(env!("CARGO_BIN_EXE_bascule-import"))
        .args(["unpack", "--parent", "1", "zstd"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the import has ended"), "{said}");
    assert_eq!(output.status.code(), Some(1));
}
