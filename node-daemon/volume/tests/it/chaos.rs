//! Three nodes under a seeded sequence of kills, freezes and restarts, with one client per node.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bascule_ipc::Connection;
use bascule_ipc::volume::{Request, Response};
use bascule_types::{Answer, Change, Epoch, VmRow, VmUid};
use rustix::process::Signal;

use crate::lab::{Lab, Node, name};

/// The last acknowledged row of each VM.
type Acknowledged = Mutex<BTreeMap<VmUid, VmRow>>;

/// A client of one node: creates and acquires VMs, and records the acknowledged rows. After a
/// failure it goes on with the next VM.
fn client(socket: &std::path::Path, n: u8, done: &AtomicBool, acknowledged: &Acknowledged) {
    let timeout = Duration::from_secs(20);
    let mut count: u8 = 0;
    while !done.load(Ordering::Acquire) {
        let Ok(mut connection) = Connection::connect(socket, timeout) else {
            std::thread::park_timeout(Duration::from_millis(20));
            continue;
        };
        let mut ask = |request: &Request| -> Option<Response> {
            let (response, _) = connection.call(request).ok()?;
            if let Response::Granted(Answer::Row(row)) = &response {
                acknowledged.lock().unwrap().insert(row.vm, row.clone());
            }
            Some(response)
        };
        count = count.wrapping_add(1);
        let vm = VmUid::from_bytes([n, count, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        let create = Change::CreateVm {
            vm,
            name: name(&format!("chaos/{n}-{count}")),
            spec_digest: [n; 32],
        };
        ask(&Request::Change(create));
        let Some(Response::Status(status)) = ask(&Request::Status) else {
            continue;
        };
        if let Some(to) = status.owner {
            let expected_epoch = Epoch(0);
            ask(&Request::Change(Change::Acquire {
                vm,
                expected_epoch,
                to,
            }));
        }
    }
}

/// Injects one fault into one node; `dice` selects both.
fn inject_fault(lab: &Lab, nodes: &mut [Node], dice: u64) {
    let which = usize::try_from(dice % 3).unwrap();
    let pause = Duration::from_millis(dice / 7 % 2500);
    let node = &mut nodes[which];
    if (dice / 3).is_multiple_of(2) {
        node.kill();
        std::thread::park_timeout(pause / 2);
        nodes[which] = lab.launch(u8::try_from(which + 1).unwrap(), &[]);
    } else {
        node.signal(Signal::STOP);
        std::thread::park_timeout(pause);
        node.signal(Signal::CONT);
    }
}

#[test]
fn i3_no_acknowledged_change_is_lost_in_a_storm() {
    // A seed replays the same sequence of faults.
    let seed: u64 = match std::env::var("BASCULE_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => 20_261_123,
    };
    println!("seed {seed}");
    let lab = Lab::new();
    let mut nodes: Vec<Node> = (1..=3).map(|n| lab.start(n)).collect();
    let (done, acknowledged) = (AtomicBool::new(false), Acknowledged::default());
    let sockets: Vec<_> = nodes
        .iter()
        .map(|node| node.run_dir.join("volume.sock"))
        .collect();
    std::thread::scope(|scope| {
        for (n, socket) in (1..).zip(&sockets) {
            let (done, acknowledged) = (&done, &acknowledged);
            scope.spawn(move || client(socket, n, done, acknowledged));
        }
        let mut dice = seed;
        for _ in 0..12 {
            // Knuth's MMIX generator.
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            inject_fault(&lab, &mut nodes, dice >> 33);
        }
        done.store(true, Ordering::Release);
    });
    let expected = acknowledged.into_inner().unwrap();
    assert!(
        expected.len() > 10,
        "only {} changes were acknowledged",
        expected.len()
    );
    for node in &mut nodes {
        node.wait_open();
        let rows = node.rows();
        for (vm, row) in &expected {
            let found = rows.vms.iter().find(|found| found.vm == *vm);
            let found = found.unwrap_or_else(|| panic!("{} is lost", row.name));
            assert!(found.epoch >= row.epoch, "{row:?} went back to {found:?}");
            let slot = |row: &VmRow| row.owner.map(|owner| owner.slot);
            // No takeover is requested here: the owner keeps its slot, in any generation.
            assert!(
                row.owner.is_none() || slot(row) == slot(found),
                "{row:?}, {found:?}"
            );
        }
    }
    for node in &mut nodes {
        assert!(node.terminate());
    }
    let report = lab.check();
    assert!(report.status.success(), "{report:?}");
}
