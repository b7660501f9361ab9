//! Metadata writes that failed in an earlier process of this boot, and may still land.

use bascule_types::{Change, SlotId};
use serde_json::{Value, json};

use crate::lab::{Lab, Node, name, vm};

/// Alters what the process of `node`, which has ended, recorded of its metadata writes.
fn alter(node: &Node, alter: impl FnOnce(&mut Value)) {
    let files = std::fs::read_dir(&node.run_dir).unwrap();
    let paths = files.map(|entry| entry.unwrap().path());
    let is_ledger = |path: &std::path::PathBuf| {
        let file = path.file_name().unwrap().to_string_lossy();
        file.starts_with("coordinator-writes-")
    };
    let path = { paths }.find(is_ledger).unwrap();
    let mut record = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    alter(&mut record);
    std::fs::write(path, serde_json::to_vec(&record).unwrap()).unwrap();
}

fn coordinator(node: &Node) -> Option<SlotId> {
    node.status().and_then(|status| status.coordinator)
}

fn create(n: u8) -> Change {
    Change::CreateVm {
        vm: vm(n),
        name: name(&format!("shop/web-{n}")),
        spec_digest: [n; 32],
    }
}

/// Regression: the next process stood for election and wrote the same block again. Two nodes could win
/// one epoch when the earlier write landed after that.
#[test]
fn i2_a_node_whose_leader_block_may_be_overwritten_coordinates_again_only_after_a_reboot() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    let mut two = lab.start(2);
    one.grant(&create(1));
    let (first, second) = (one.owner().slot, two.owner().slot);
    assert_eq!(coordinator(&one), Some(first));
    one.kill();
    alter(&one, |record| {
        assert_eq!(
            (&record["submitted"], &record["failed"]),
            (&json!([]), &json!([]))
        );
        record["failed"] = json!([[first, "Leader"]]);
    });
    let mut one = lab.start(1);
    // The node serves its guests, and the other one coordinates.
    two.grant(&create(2));
    assert_eq!(coordinator(&two), Some(second));
    one.wait_log("this node takes part in no election");
    one.wait_status("the other coordinator", |status| {
        status.coordinator == Some(second)
    });
    two.kill();
    one.kill();
    alter(&one, |record| record["boot"] = json!("0"));
    let one = lab.start(1);
    one.grant(&create(3));
    assert_eq!(coordinator(&one), Some(first));
    assert_eq!(one.rows().vms.len(), 3);
}

#[test]
fn a_node_whose_next_area_may_be_overwritten_does_not_stand_for_election() {
    let lab = Lab::new();
    let mut one = lab.start(1);
    one.grant(&create(1));
    let slot = one.owner().slot;
    one.kill();
    alter(&one, |record| {
        record["failed"] = json!([[slot, { "Area": 0 }], [slot, { "Area": 1 }]]);
    });
    let one = lab.launch(1, &[]);
    one.wait_log("a failed write may still land in metadata area");
    assert!(lab.check().status.success());
}
