//! Damaged blocks of a volume in a file: ignored while nodes serve it, and repaired offline.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Output;

use bascule_types::{Change, Lba, SlotId};
use bascule_volume_format::{AreaId, Superblock};

use crate::lab::{LAST_COPY, Lab, Node, binary, name, vm};

fn superblock(lab: &Lab) -> Superblock {
    let file = File::open(lab.device()).unwrap();
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, 0).unwrap();
    Superblock::parse_copy(&block, Lba(0)).unwrap()
}

fn damage(lab: &Lab, lba: Lba) {
    let file = OpenOptions::new().write(true).open(lab.device()).unwrap();
    file.write_all_at(&[0xEE; 512], lba.0 * 4096).unwrap();
}

fn repair(lab: &Lab, more: &[&str]) -> (Option<i32>, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = binary()
        .arg("repair")
        .arg(lab.device())
        .args(more)
        .output()
        .unwrap();
    let said = [stdout, stderr].concat();
    (status.code(), String::from_utf8(said).unwrap())
}

fn create(node: &Node, n: u8) {
    node.grant(&Change::CreateVm {
        vm: vm(n),
        name: name(&format!("shop/web-{n}")),
        spec_digest: [n; 32],
    });
}

/// Regression: one damaged leader block or checkpoint head of any slot stopped every node.
#[test]
fn a_damaged_block_of_a_slot_that_does_not_coordinate_stops_nobody_and_is_repaired_offline() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    create(&one, 1);
    let superblock = superblock(&lab);
    let (other, half) = (SlotId(2), 0);
    let leader = superblock.leader_lba(other);
    let head = superblock.area(AreaId { slot: other, half }).head;
    damage(&lab, leader);
    damage(&lab, head);
    create(&one, 2);
    one.wait_log(&format!(
        "the leader block at block {} is damaged",
        leader.0
    ));
    // A new coordinator recovers the metadata.
    one.kill();
    let mut one = lab.start(1);
    create(&one, 3);
    one.wait_log(&format!(
        "the checkpoint head at block {} is damaged",
        head.0
    ));
    assert!(one.terminate());

    assert_eq!(lab.check().status.code(), Some(1), "usable, with warnings");
    let (code, said) = repair(&lab, &[]);
    assert_eq!(code, Some(1), "{said}");
    let said_all = said.contains(&leader.0.to_string()) && said.contains(&head.0.to_string());
    assert!(said_all && said.contains("--yes"), "{said}");
    assert_eq!(lab.check().status.code(), Some(1), "nothing was written");
    let (code, said) = repair(&lab, &["--yes"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(lab.check().status.code(), Some(0));
    assert_eq!(lab.start(1).rows().vms.len(), 3);
}

/// Its own Paxos blocks would say that the damaged leader block may be the newest.
#[test]
fn a_node_blanks_its_damaged_leader_block_before_it_stands_for_election() {
    let lab = Lab::new();
    let (mut one, two) = (lab.start(1), lab.start(2));
    create(&one, 1);
    let second = two.owner().slot;
    damage(&lab, superblock(&lab).leader_lba(second));
    one.kill();
    create(&two, 2);
    let coordinator = two.status().unwrap().coordinator;
    assert_eq!(coordinator, Some(second));
    assert_eq!(two.rows().vms.len(), 2);
    assert_eq!(lab.check().status.code(), Some(0));
}

#[test]
fn the_coordinators_own_leader_block_is_repaired_and_only_on_a_detached_volume() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    create(&one, 1);
    let leader = superblock(&lab).leader_lba(one.owner().slot);
    damage(&lab, leader);
    one.wait_log("is damaged and may be the newest");
    let (code, said) = repair(&lab, &["--yes"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("has the volume attached"), "{said}");
    one.kill();
    let (code, said) = repair(&lab, &["--yes"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("won epoch"), "{said}");
    let one = lab.start(1);
    create(&one, 2);
    assert_eq!(one.rows().vms.len(), 2);
}

/// A volume whose first MiB was overwritten, in a file that has grown since: with the copy that a node reports, and
/// without it.
#[test]
fn a_lost_superblock_is_reported_by_the_node_that_serves_the_volume_and_repaired() {
    let lab = Lab::new();
    let superblock = superblock(&lab);
    damage(&lab, Lba(0));
    let mut one = lab.start(1);
    one.wait_log("superblock copy at block 0");
    create(&one, 1);
    assert!(one.terminate());
    let checked = lab.check();
    let said = String::from_utf8(checked.stdout).unwrap();
    assert_eq!(checked.status.code(), Some(1), "{said}");
    assert!(said.contains("superblock copy at block 0"), "{said}");
    let file = OpenOptions::new().write(true).open(lab.device()).unwrap();
    file.set_len(80 << 20).unwrap();
    let (code, said) = repair(&lab, &["--yes"]);
    assert_eq!(
        code,
        Some(3),
        "the last one is not where the file ends: {said}"
    );
    file.set_len(64 << 20).unwrap();
    assert_eq!(repair(&lab, &["--yes"]).0, Some(0));
    assert_eq!(self::superblock(&lab), superblock);
    file.set_len(80 << 20).unwrap();
    damage(&lab, LAST_COPY);
    let (code, said) = repair(&lab, &["--yes"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        lab.check().status.code(),
        Some(0),
        "it is where the volume ends"
    );
    assert_eq!(lab.start(1).rows().vms.len(), 1);
}

#[test]
fn damage_that_nothing_proves_is_not_repaired() {
    let lab = Lab::new();
    let superblock = superblock(&lab);
    // The only checkpoint of a new volume.
    let slot = SlotId(0);
    damage(&lab, superblock.area(AreaId { slot, half: 0 }).head);
    for more in [&[][..], &["--yes"]] {
        let (code, said) = repair(&lab, more);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("no other checkpoint can be read"), "{said}");
    }
    assert_eq!(lab.check().status.code(), Some(2));
    // A superblock copy is.
    damage(&lab, LAST_COPY);
    assert_eq!(repair(&lab, &["--yes"]).0, Some(2));
    let file = File::open(lab.device()).unwrap();
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, LAST_COPY.0 * 4096).unwrap();
    assert_eq!(
        Superblock::parse_copy(&block, LAST_COPY).unwrap(),
        superblock
    );
}
