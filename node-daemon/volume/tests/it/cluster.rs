//! Several `bascule-volume` processes on one volume: coordination, fencing, restart, writers.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::lab::{Lab, Node, name, vm};
use bascule_ipc::volume::{PathState, Request, Response, VolumeStatus};
use bascule_types::{
    AdminConfirmation, Answer, AttemptId, Change, Epoch, FenceProof, MissingProof, Refusal, VmRow,
};
use bascule_volume_gate::{GateClosedReason, GateReader, boot_time_now};
use rustix::process::Signal;

fn take_over(victim: &VmRow, by: &Node) -> Change {
    Change::TakeOver {
        vm: victim.vm,
        from: victim.owner.unwrap(),
        epoch: victim.epoch,
        to: by.owner(),
    }
}

#[test]
fn three_nodes_share_a_volume_and_move_a_vm_between_them() {
    let lab = Lab::new();
    let (one, two, three) = (lab.start(1), lab.start(2), lab.start(3));
    let row = one.create_and_own(1);
    let disk = one.create_disk(1, "shop/data", 4);
    assert!(!disk.importing);
    let transfer = Change::Transfer {
        vm: vm(1),
        from: one.owner(),
        epoch: row.epoch,
        to: two.owner(),
        attempt: AttemptId::random(),
    };
    let moved = one.grant(&transfer);
    assert_eq!(
        one.grant(&transfer),
        moved,
        "a repeated transfer has the same answer and no second effect"
    );
    // Every node sees the same rows, whichever node coordinates.
    for node in [&one, &two, &three] {
        let row = node.row(1);
        assert_eq!((row.owner, row.epoch), (Some(two.owner()), Epoch(2)));
        assert_eq!(node.rows().disks.len(), 1);
    }
    let back = Change::Transfer {
        vm: vm(1),
        from: one.owner(),
        epoch: row.epoch,
        to: three.owner(),
        attempt: AttemptId::random(),
    };
    let refused = one.ask(&back);
    assert!(
        matches!(refused, Response::Refused(Refusal::OwnedBy { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_killed_coordinator_is_replaced_and_loses_no_acknowledged_change() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let two = lab.start(2);
    one.create_and_own(1);
    let create = |n: u8| Change::CreateVm {
        vm: vm(n),
        name: name(&format!("shop/more-{n}")),
        spec_digest: [n; 32],
    };
    for n in 2..20 {
        two.grant(&create(n));
        if n == 10 {
            one.kill();
        }
    }
    let rows = two.rows();
    assert_eq!(rows.vms.len(), 19);
    let status = two.status().unwrap();
    assert_eq!(status.coordinator, Some(two.owner().slot));
    // The old coordinator comes back as an ordinary node.
    let one = lab.start(1);
    assert_eq!(one.rows().vms.len(), 19);
}

#[test]
fn a_frozen_coordinator_is_replaced_and_accepts_its_successor_when_it_resumes() {
    let lab = Lab::new();
    let (one, two) = (lab.start(1), lab.start(2));
    let first = two.create_and_own(1);
    one.signal(Signal::STOP);
    // Granted while the old coordinator is frozen, so another one has answered.
    two.create_and_own(2);
    let slot = two.owner().slot;
    assert_eq!(two.status().unwrap().coordinator, Some(slot));
    one.signal(Signal::CONT);
    let rows = one.rows();
    assert_eq!(rows.vms.len(), 2);
    assert_eq!(one.row(1), first);
    let status = one.wait_status("the new coordinator", |status| {
        status.coordinator == Some(slot)
    });
    assert!(status.coordinator_epoch >= rows.coordinator_epoch);
}

#[test]
fn a_failed_metadata_write_closes_the_gate_until_a_new_process_has_verified_the_volume() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let owner = one.create_and_own(1).owner.unwrap();
    let gate = GateReader::open(one.run_dir.join("gate")).unwrap();
    gate.check(boot_time_now(), owner).unwrap();
    // From here on, writes of heartbeats succeed and writes to metadata areas fail.
    one.limit_writes_to_heartbeats(&lab);
    let create = Change::CreateVm {
        vm: vm(2),
        name: name("shop/lost"),
        spec_digest: [2; 32],
    };
    let (answer, _) = one.call(&Request::Change(create.clone())).unwrap();
    assert!(matches!(answer, Response::Unknown), "{answer:?}");
    let closed = gate.check(boot_time_now(), owner).unwrap_err();
    assert_eq!(closed.reason, GateClosedReason::StickyFailed);
    let status = one.status().unwrap();
    let reason = status.reason.unwrap();
    assert_eq!(status.path, PathState::Unavailable);
    assert!(reason.contains("cannot write the journal"), "{reason}");
    one.kill();
    let one = lab.start(1);
    gate.check(boot_time_now(), one.owner()).unwrap();
    one.grant(&create);
    assert_eq!(one.rows().vms.len(), 2);
}

/// Regression: the report closed the gate for every VM of the node until the volume's process was killed.
#[test]
fn a_disk_that_a_vm_reports_as_failed_is_of_that_vm_alone_and_keeps_it_here() {
    let lab = Lab::new();
    let (mut one, two) = (lab.start(1), lab.start(2));
    let row = one.create_and_own(1);
    let owner = row.owner.unwrap();
    let (opened, fds) = one.open_vm(&row);
    assert!(matches!(opened, Response::Opened(_)), "{opened:?}");
    drop(fds);
    let gate = GateReader::open(one.run_dir.join("gate")).unwrap();
    for what in ["shop/web: disk \"data\": flush failed", "a second one"] {
        let report = Request::ReportFailure {
            vm: row.vm,
            what: what.to_owned(),
        };
        assert_eq!(one.call(&report).unwrap().0, Response::Noted);
    }
    gate.check(boot_time_now(), owner).unwrap();
    assert_eq!(one.status().unwrap().path, PathState::Direct);

    // Nobody is told that its writes are complete: neither now nor after a restart.
    let (vm, epoch) = (row.vm, row.epoch);
    let to = two.owner();
    let attempt = AttemptId::random();
    let from = owner;
    let refused = [
        Request::CloseVm { vm, owner, epoch },
        Request::Change(Change::Release { vm, from, epoch }),
        Request::Change(Change::Transfer {
            vm,
            from,
            epoch,
            to,
            attempt,
        }),
    ];
    for restart in [false, true] {
        if restart {
            one.kill();
            one = lab.launch(1, &[]);
            one.wait_open();
        }
        for request in &refused {
            let (response, _) = one.call(request).unwrap();
            let Response::Unavailable { reason } = response else {
                panic!("{request:?}: {response:?}");
            };
            assert!(reason.contains("restart this node"), "{reason}");
        }
        gate.check(boot_time_now(), owner).unwrap();
    }
    assert_eq!(one.row(1), row);
    // The writer itself goes on.
    assert!(matches!(one.open_vm(&row).0, Response::Opened(_)));
}

#[test]
fn i1_a_vm_is_not_opened_while_an_earlier_writer_of_it_may_write() {
    let lab = Lab::new();
    let one = lab.start(1);
    let row = one.create_and_own(1);
    let mut writer = spawn_writer(&one, &row);
    let (refused, _) = one.open_vm(&row);
    let Response::Unavailable { reason } = refused else {
        panic!("{refused:?}");
    };
    assert!(reason.contains(&writer.id().to_string()), "{reason}");
    writer.kill().unwrap();
    writer.wait().unwrap();
    let killed_at = Instant::now();
    let open = |node: &Node| matches!(node.open_vm(&row).0, Response::Opened(_)).then_some(());
    one.wait("the VM to open", open, |()| true);
    assert!(killed_at.elapsed().as_millis() >= 500, "settle");
}

#[test]
fn heartbeat_write_errors_let_the_lease_lapse_and_the_node_rejoins_with_its_vms() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let row = one.create_and_own(1);
    let gate = GateReader::open(one.run_dir.join("gate")).unwrap();
    gate.check(boot_time_now(), row.owner.unwrap()).unwrap();
    one.fail_heartbeats(&lab, true);
    let status = one.wait_status("Unavailable", |status| {
        status.path == PathState::Unavailable
    });
    let reason = status.reason.unwrap();
    assert!(reason.contains("cannot write the heartbeat"), "{reason}");
    let closed = gate.check(boot_time_now(), row.owner.unwrap()).unwrap_err();
    assert!(
        matches!(closed.reason, GateClosedReason::Expired { .. }),
        "{closed}"
    );
    one.fail_heartbeats(&lab, false);
    one.wait_open();
    let after = one.wait(
        "the VM to keep its owner",
        |one| Some(one.row(1)),
        |after| after.owner == Some(one.owner()),
    );
    assert_eq!(after.epoch, row.epoch);
}

#[test]
fn a_takeover_is_refused_before_the_safe_time_and_granted_after_it() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let two = lab.start(2);
    let row = one.create_and_own(1);
    let ask = take_over(&row, &two);
    let refused = two.ask(&ask);
    let alive = Refusal::NotFenced {
        victim: one.owner(),
        missing: MissingProof::Alive,
    };
    assert_eq!(refused, Response::Refused(alive));
    let killed_at = Instant::now();
    one.kill();
    let mut reasons = Vec::new();
    let granted = loop {
        match two.ask(&ask) {
            Response::Granted(answer) => break answer,
            Response::Refused(Refusal::NotFenced { missing, .. }) => reasons.push(missing),
            other => panic!("{other:?}"),
        }
        assert!(killed_at.elapsed().as_secs() < 60, "{reasons:?}");
        std::thread::park_timeout(std::time::Duration::from_millis(100));
    };
    let waited = killed_at.elapsed();
    assert!(waited.as_millis() >= 7700, "granted after {waited:?}");
    let counted = reasons.iter().any(|missing| {
        matches!(
            missing,
            MissingProof::SafeTime {
                required_ms: 8000,
                ..
            }
        )
    });
    assert!(counted, "{reasons:?}");
    let Answer::Row(row) = granted else {
        panic!("{granted:?}");
    };
    assert_eq!((row.owner, row.epoch), (Some(two.owner()), Epoch(2)));
    let rows = two.rows();
    let FenceProof::SafeTimeElapsed { watched_ms, .. } = rows.fences[0].proof else {
        panic!("{:?}", rows.fences);
    };
    assert!(watched_ms >= 8000);
    // The fenced node rejoins and does not get its VM back.
    let one = lab.start(1);
    assert_eq!(one.row(1).owner, Some(two.owner()));
}

#[test]
fn lease_only_takes_over_only_after_a_manual_fencing_confirmation() {
    let lab = Lab::with_fencing("lease-only");
    let mut one = lab.start(1);
    let two = lab.start(2);
    let row = one.create_and_own(1);
    let victim = row.owner.unwrap();
    one.kill();
    let ask = take_over(&row, &two);
    // Longer than the safe time: under LeaseOnly no waiting time is a fence proof.
    two.wait_status("the heartbeat of node 1 to stop", |status| {
        status.peers.iter().any(|peer| peer.no_heartbeat_ms > 8500)
    });
    let refused = Response::Refused(Refusal::NotFenced {
        victim,
        missing: MissingProof::AdminConfirmation,
    });
    assert_eq!(two.ask(&ask), refused);
    let taint = Change::ConfirmFenced {
        victim,
        confirmation: AdminConfirmation::OutOfServiceTaint,
    };
    assert_eq!(two.ask(&taint), Response::Refused(Refusal::NotAllowed));
    let confirmation = AdminConfirmation::Confirmed;
    two.grant(&Change::ConfirmFenced {
        victim,
        confirmation,
    });
    two.grant(&ask);
    assert_eq!(two.row(1).owner, Some(two.owner()));
}

#[test]
fn a_frozen_node_stalls_and_rejoins_with_its_vms() {
    let lab = Lab::new();
    let one = lab.start(1);
    let two = lab.start(2);
    let row = two.create_and_own(1);
    let gate = GateReader::open(two.run_dir.join("gate")).unwrap();
    let before = two.owner();
    gate.check(boot_time_now(), before).unwrap();
    two.signal(Signal::STOP);
    let peer = |status: &VolumeStatus| status.peers.iter().find(|p| p.owner == before).cloned();
    let status = one.wait_status("the heartbeat of node 2 to stop", |status| {
        peer(status).is_some_and(|peer| peer.no_heartbeat_ms > 2500)
    });
    let suspect = peer(&status).unwrap();
    assert!(!suspect.alive, "its lease of 2 s is over: {suspect:?}");
    gate.check(boot_time_now(), before)
        .expect_err("the lease of a frozen node expires in the gate page");
    two.signal(Signal::CONT);
    let status = two.wait_status("a new generation", |status| {
        status.path == PathState::Direct && status.owner.is_some_and(|now| now != before)
    });
    let after = status.owner.unwrap();
    assert_eq!(
        (after.slot, after.generation),
        (before.slot, before.generation.next())
    );
    let now = two.row(1);
    assert_eq!((now.owner, now.epoch), (Some(after), row.epoch), "kept");
    gate.check(boot_time_now(), before)
        .expect_err("the old generation is over");
    gate.check(boot_time_now(), after).unwrap();
}

#[test]
fn i4_a_killed_and_restarted_process_closes_no_gate() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let row = one.create_and_own(1);
    let owner = row.owner.unwrap();
    let (opened, fds) = one.open_vm(&row);
    assert!(matches!(opened, Response::Opened(_)), "{opened:?}");
    let gate = GateReader::from_fd(fds.into_iter().nth(1).unwrap()).unwrap();
    for _ in 0..3 {
        one.kill();
        gate.check(boot_time_now(), owner).unwrap();
        one = lab.launch(1, &[]);
        one.wait_open();
        gate.check(boot_time_now(), owner).unwrap();
        assert_eq!(one.owner(), owner, "slot and generation are kept");
    }
    // The new process knows the writer: the VM cannot be released while it is open.
    let release = Change::Release {
        vm: vm(1),
        from: owner,
        epoch: row.epoch,
    };
    let (refused, _) = one.call(&Request::Change(release.clone())).unwrap();
    let is_open = matches!(refused, Response::Unavailable { .. });
    assert!(is_open, "{refused:?}");
    let close = Request::CloseVm {
        vm: vm(1),
        owner,
        epoch: row.epoch,
    };
    let (closed, _) = one.call(&close).unwrap();
    assert_eq!(closed, Response::Closed);
    one.grant(&release);
    assert_eq!(one.row(1).owner, None);
}

/// A host's shutdown sends SIGTERM to all processes at once: without a lease the guests could not write
/// what they write as they shut down, and without the process not release their ownership.
#[test]
fn sigterm_ends_the_process_only_when_its_writers_have_closed_and_released() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let row = one.create_and_own(1);
    let owner = row.owner.unwrap();
    let (opened, fds) = one.open_vm(&row);
    assert!(matches!(opened, Response::Opened(_)), "{opened:?}");
    let gate = GateReader::from_fd(fds.into_iter().nth(1).unwrap()).unwrap();
    let renewed = one.status().unwrap().lease_left_ms;
    one.signal(Signal::TERM);
    one.wait_log("ending once the writers");
    one.signal(Signal::TERM);
    one.wait_status("a renewal after the signal", |status| {
        status.lease_left_ms > 0 && status.lease_left_ms != renewed
    });
    gate.check(boot_time_now(), owner).unwrap();
    let close = Request::CloseVm {
        vm: vm(1),
        owner,
        epoch: row.epoch,
    };
    assert_eq!(one.call(&close).unwrap().0, Response::Closed);
    one.grant(&Change::Release {
        vm: vm(1),
        from: owner,
        epoch: row.epoch,
    });
    assert!(one.ends_cleanly());
}

#[test]
fn a_process_that_is_stopped_by_sigterm_leaves_and_another_coordinates_at_once() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let two = lab.start(2);
    assert!(one.terminate());
    let slot = two.owner().slot;
    let since = Instant::now();
    two.wait_status("node 2 to coordinate", |status| {
        status.coordinator == Some(slot)
    });
    assert!(
        since.elapsed().as_millis() < 6000,
        "the election waited for the watch time"
    );
    assert!(lab.check().status.success(), "{:?}", lab.check());
}

#[test]
fn a_vm_is_opened_only_by_its_owner_and_a_new_disk_reads_as_zeroes() {
    let lab = Lab::new();
    let (one, two) = (lab.start(1), lab.start(2));
    let row = one.create_and_own(1);
    // Non-zero bytes in the extents of the next disk.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(lab.device())
        .unwrap();
    let peek = Request::PeekVm { vm: vm(1) };
    let disk = one.create_disk(1, "shop/first", 2);
    let start = disk.extents[0].start.lba_to_bytes().unwrap().0;
    file.write_all_at(&[0xEE; 8192], start).unwrap();
    let stale = one.open_vm(&VmRow {
        epoch: Epoch(7),
        ..row.clone()
    });
    assert!(matches!(
        stale.0,
        Response::Refused(Refusal::OwnedBy { .. })
    ));
    let elsewhere = two.open_vm(&row);
    assert!(matches!(
        elsewhere.0,
        Response::Refused(Refusal::StaleOwner { .. })
    ));
    one.grant(&Change::Release {
        vm: vm(1),
        from: row.owner.unwrap(),
        epoch: row.epoch,
    });
    one.grant(&Change::DeleteDisk { disk: disk.disk });
    let again = one.create_disk(1, "shop/second", 2);
    assert_eq!(again.extents, disk.extents, "the same space");
    let (response, fds) = one.call(&peek).unwrap();
    let Response::Opened(opened) = response else {
        panic!("{response:?}");
    };
    assert_eq!((opened.disks.len(), fds.len()), (1, 3));
    let mut bytes = [1; 8192];
    std::fs::File::open(lab.device())
        .unwrap()
        .read_exact_at(&mut bytes, start)
        .unwrap();
    assert_eq!(bytes, [0; 8192]);
}

/// Regression: for a second after its death the writer was taken for one that lives, and the release refused.
#[test]
fn the_vm_of_a_killed_writer_is_released_after_the_settle_time() {
    let lab = Lab::new();
    let one = lab.start(1);
    let row = one.create_and_own(1);
    let mut writer = spawn_writer(&one, &row);
    let release = Change::Release {
        vm: vm(1),
        from: row.owner.unwrap(),
        epoch: row.epoch,
    };
    let (refused, _) = one.call(&Request::Change(release.clone())).unwrap();
    let is_open = matches!(refused, Response::Unavailable { .. });
    assert!(is_open, "{refused:?}");
    writer.kill().unwrap();
    writer.wait().unwrap();
    let killed_at = Instant::now();
    let (released, _) = one.call(&Request::Change(release)).unwrap();
    assert!(matches!(released, Response::Granted(_)), "{released:?}");
    assert!(killed_at.elapsed().as_millis() >= 500, "settle");
}

/// A process that opens the VM and dies without a word.
fn spawn_writer(one: &Node, row: &VmRow) -> std::process::Child {
    let mut writer = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "cluster::writer_that_is_killed",
            "--ignored",
            "--nocapture",
        ])
        .env("BASCULE_TEST_SOCKET", one.run_dir.join("volume.sock"))
        .env("BASCULE_TEST_REQUEST", one.open_request(row))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut out = std::io::BufReader::new(writer.stdout.take().unwrap());
    while !said.contains("opened") {
        said.clear();
        let read = std::io::BufRead::read_line(&mut out, &mut said).unwrap();
        assert!(read > 0, "the writer ended");
    }
    writer
}

/// Not a test: the child of `spawn_writer`.
#[test]
#[ignore = "run by the_vm_of_a_killed_writer_is_released_after_the_settle_time"]
fn writer_that_is_killed() {
    let socket = std::env::var_os("BASCULE_TEST_SOCKET").unwrap();
    let request = std::env::var("BASCULE_TEST_REQUEST").unwrap();
    let request: Request = serde_json::from_str(&request).unwrap();
    let minute = std::time::Duration::from_secs(60);
    let mut connection =
        bascule_ipc::Connection::connect(std::path::Path::new(&socket), minute).unwrap();
    let (response, _) = connection.call::<_, Response>(&request).unwrap();
    assert!(matches!(response, Response::Opened(_)), "{response:?}");
    println!("opened");
    std::thread::park_timeout(minute);
}
