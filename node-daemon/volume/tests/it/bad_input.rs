//! Damaged, foreign and missing devices: the error names the problem, and no data is lost.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::lab::{LAST_COPY, Lab, Node, binary, vm};
use bascule_ipc::volume::{PathState, Request, Response};
use bascule_types::{Change, Lba, Refusal};
use bascule_volume_format::{Superblock, UnfinishedFormat, seal_block};

fn reason(node: &Node) -> Option<String> {
    match node.call(&Request::Status)?.0 {
        Response::Unavailable { reason } => Some(reason),
        Response::Status(status) => status.reason,
        _ => None,
    }
}

fn write_at(lab: &Lab, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(lab.device()).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// A write of an earlier format that had failed could land after a later one, on blocks that a node had written since.
#[test]
fn a_device_whose_format_has_not_finished_is_formatted_again_with_force_only() {
    let lab = Lab::new();
    let file = File::options().read(true).write(true).open(lab.device());
    let file = file.unwrap();
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, 0).unwrap();
    let superblock = Superblock::parse_copy(&block, Lba(0)).unwrap();
    let settle = Duration::from_millis(700);
    for lba in superblock.copy_lbas() {
        let unfinished = UnfinishedFormat { settle };
        let block = seal_block(&unfinished, superblock.place(lba));
        file.write_all_at(&block, lba.0 * 4096).unwrap();
    }
    let checked = lab.check();
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert_eq!(checked.status.code(), Some(3), "{said}");
    assert!(said.contains("has not finished"), "{said}");
    let refused = lab.format(&[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(
        said.contains("restart the node") && said.contains("--force"),
        "{said}"
    );
    let began = Instant::now();
    let formatted = lab.format(&["--force"]);
    assert!(formatted.status.success());
    assert!(began.elapsed() >= settle, "it waits until that has settled");
    let said = String::from_utf8_lossy(&formatted.stderr).into_owned();
    assert!(said.contains("waiting 1 s"), "{said}");
    assert!(lab.check().status.success());
}

#[test]
fn format_refuses_a_device_that_is_not_blank_without_force() {
    let lab = Lab::new();
    let again = lab.format(&[]);
    assert_eq!(again.status.code(), Some(4));
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(
        said.contains("--force") && said.contains("volume.img"),
        "{said}"
    );
    assert!(lab.check().status.success(), "nothing was altered");
    assert!(lab.format(&["--force"]).status.success());
    write_at(&lab, 0, &[0; 4096]);
    write_at(&lab, LAST_COPY.0 * 4096, &[0; 4096]);
    write_at(&lab, 1080, b"ext4");
    let said = String::from_utf8(lab.format(&[]).stderr).unwrap();
    assert!(said.contains("holds data"), "{said}");
}

#[test]
fn format_refuses_a_device_that_is_too_small_and_an_unsupported_fencing_mode() {
    let lab = Lab::new();
    let small = OpenOptions::new().write(true).open(lab.device()).unwrap();
    small.set_len(1 << 20).unwrap();
    let refused = lab.format(&["--force"]);
    assert_eq!(refused.status.code(), Some(5));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("at least"), "{said}");
    small.set_len(64 << 20).unwrap();
    let refused = lab.format(&["--force", "--fencing", "persistent-reservation"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("PersistentReservation is not supported"),
        "{said}"
    );
}

#[test]
fn check_distinguishes_a_foreign_device_and_a_damaged_volume() {
    let lab = Lab::new();
    assert_eq!(lab.check().status.code(), Some(0));
    write_at(&lab, LAST_COPY.0 * 4096, &[9; 512]);
    let one_copy = lab.check();
    assert_eq!(one_copy.status.code(), Some(1), "{one_copy:?}");
    write_at(&lab, 0, &[9; 512]);
    assert_eq!(lab.check().status.code(), Some(3));
    assert!(lab.format(&["--force"]).status.success());
    // Damage a checkpoint head.
    let file = File::open(lab.device()).unwrap();
    let mut bytes = vec![0; 8 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let head = (256..2048)
        .find(|lba| bytes[lba * 4096..].starts_with(b"BSCL\x05\0"))
        .unwrap();
    write_at(&lab, head as u64 * 4096 + 60, &[1]);
    let damaged = lab.check();
    assert_eq!(damaged.status.code(), Some(2), "{damaged:?}");
    let said = String::from_utf8(damaged.stdout).unwrap();
    assert!(
        said.contains("checkpoint head") && said.contains("DAMAGED"),
        "{said}"
    );
}

/// `bascule-volume check | head`: the tool panicked, and a repair would have stopped half-way.
#[test]
fn a_reader_that_has_gone_changes_no_outcome() {
    let lab = Lab::new();
    let unread = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = binary();
        command.arg(args[0]).arg(lab.device()).args(&args[1..]);
        command.stdout(writer.try_clone().unwrap()).stderr(writer);
        command.status().unwrap().code()
    };
    assert_eq!(unread(&["check"]), Some(0));
    write_at(&lab, LAST_COPY.0 * 4096, &[9; 512]);
    assert_eq!(unread(&["check"]), Some(1), "usable, with warnings");
    assert_eq!(unread(&["repair"]), Some(1), "nothing was written");
    assert_eq!(unread(&["repair", "--yes"]), Some(0));
    assert_eq!(unread(&["check"]), Some(0));
    write_at(&lab, 0, &[9; 512]);
    write_at(&lab, LAST_COPY.0 * 4096, &[9; 512]);
    assert_eq!(unread(&["check"]), Some(3), "not a volume");
    assert_eq!(unread(&["repair"]), Some(3));
}

#[test]
fn serve_names_the_expected_volume_and_serves_once_it_is_present() {
    let lab = Lab::new();
    let other = "6fa459ea-ee8a-4ca4-894e-db77e160355e";
    let node = lab.launch(1, &["--volume", other]);
    node.wait("the reason", reason, |reason| {
        reason.contains("holds volume") && reason.contains(other)
    });
    drop(node);
    let node = lab.launch(1, &["--cluster", other]);
    node.wait("the reason", reason, |reason| {
        reason.contains("bound to cluster")
    });
    drop(node);
    // The device is blank at first; the same process serves it once it is formatted.
    write_at(&lab, 0, &[0; 4096]);
    write_at(&lab, LAST_COPY.0 * 4096, &[0; 4096]);
    let mut node = lab.launch(1, &[]);
    node.wait("the reason", reason, |reason| {
        reason.contains("holds no Bascule volume") && reason.contains("volume.img")
    });
    assert!(lab.format(&["--force"]).status.success());
    node.wait_open();
}

/// Makes the superblock copy at `lba` one of a later release: unknown incompat flag, valid checksum.
fn make_newer(lab: &Lab, lba: u64) {
    let file = File::open(lab.device()).unwrap();
    let mut block = [0; 512];
    file.read_exact_at(&mut block, lba * 4096).unwrap();
    block[60] = 1;
    block[8..12].fill(0);
    let crc = crc32c::crc32c(&block);
    block[8..12].copy_from_slice(&crc.to_le_bytes());
    write_at(lab, lba * 4096, &block);
}

#[test]
fn serve_reports_a_newer_format_and_damaged_metadata() {
    let lab = Lab::new();
    make_newer(&lab, 0);
    make_newer(&lab, LAST_COPY.0);
    let node = lab.launch(1, &[]);
    node.wait("the reason", reason, |reason| {
        reason.contains("volume.img") && reason.contains("newer than this release knows")
    });
    drop(node);
    assert_eq!(lab.check().status.code(), Some(4));

    assert!(lab.format(&["--force"]).status.success());
    let file = File::open(lab.device()).unwrap();
    let mut bytes = vec![0; 8 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let head = (256..2048)
        .find(|lba| bytes[lba * 4096..].starts_with(b"BSCL\x05\0"))
        .unwrap();
    write_at(&lab, head as u64 * 4096 + 60, &[1]);
    let node = lab.launch(1, &[]);
    let damaged = format!("block {head} is damaged");
    node.wait("the reason", reason, |reason| {
        reason.contains("the metadata is damaged") && reason.contains(&damaged)
    });
}

#[test]
fn a_missing_device_is_reported_and_the_node_rejoins_when_it_is_back() {
    let lab = Lab::new();
    let mut node = lab.start(1);
    let elsewhere = lab.device().with_extension("away");
    std::fs::rename(lab.device(), &elsewhere).unwrap();
    let status = node.wait_status("Unavailable", |status| {
        status.path == PathState::Unavailable
    });
    let reason = status.reason.unwrap();
    assert!(reason.contains("cannot read the volume"), "{reason}");
    std::fs::rename(&elsewhere, lab.device()).unwrap();
    node.wait_open();
}

#[test]
fn a_full_volume_refuses_a_disk_with_free_and_needed_bytes() {
    let lab = Lab::new();
    let node = lab.start(1);
    node.create_and_own(1);
    let huge = Change::CreateDisk {
        vm: vm(1),
        name: crate::lab::name("shop/huge"),
        size: bascule_types::Bytes::gib(1),
        role: bascule_types::DiskRole::Data,
        importing: false,
    };
    let refused = node.ask(&huge);
    let Response::Refused(Refusal::Full { free, needed }) = refused else {
        panic!("{refused:?}");
    };
    assert!(free < needed && needed == bascule_types::Bytes::gib(1));
    let status = node.status().unwrap();
    assert_eq!(
        status.allocated,
        bascule_types::Bytes(0),
        "no extent was allocated"
    );
}

#[test]
fn a_peer_that_sends_garbage_or_has_no_certificate_changes_nothing() {
    let lab = Lab::new();
    let (one, two) = (lab.start(1), lab.start(2));
    let status = two.wait_status("the peer's address", |status| {
        status.peers.iter().any(|peer| peer.address.is_some())
    });
    for address in status.peers.iter().filter_map(|peer| peer.address) {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&[0xFF; 4096]).unwrap();
        let mut plain = TcpStream::connect(address).unwrap();
        plain
            .write_all(b"\x1d\0\0\0{\"version\":1,\"version_min\":1}")
            .unwrap();
    }
    // Both nodes still serve on the same ports.
    one.create_and_own(1);
    assert_eq!(two.rows().vms.len(), 1);
}
