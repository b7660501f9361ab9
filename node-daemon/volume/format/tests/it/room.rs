//! The largest volume has room for what its format's documentation promises.

use std::collections::BTreeSet;

use bascule_types::{
    Bytes, DiskId, DiskRole, DiskRow, Epoch, ExtentRun, Lba, RowName, SlotId, VmRow, VmUid,
};
use bascule_volume_format::{
    CoordinatorEpoch, FormatRequest, Log, MemStore, MetaRecord, Metadata, RegionKind, SLOTS_MAX,
    Superblock, make_volume, recover,
};

use crate::fixture::{node, request};

/// 10,000 VMs with three disks each, and 100,000 disks more.
const VMS: u64 = 10_000;
const DISKS: u64 = 130_000;

fn name(what: &str, n: u64) -> RowName {
    RowName::new(format!("namespace-with-a-long-name/{what}-{n}")).unwrap()
}

fn rows(superblock: &Superblock) -> impl Iterator<Item = MetaRecord> {
    let start = superblock.region(RegionKind::Extents).start.0;
    let vms = (0..VMS).map(|n| {
        MetaRecord::Vm(VmRow {
            vm: VmUid::from_bytes(u128::from(n).to_be_bytes()),
            name: name("vm", n),
            owner: None,
            epoch: Epoch(n),
            attempt: None,
            spec_digest: [7; 32],
        })
    });
    let disks = (0..DISKS).map(move |n| {
        MetaRecord::Disk(DiskRow {
            disk: DiskId::from_bytes(u128::from(n).to_be_bytes()),
            name: name("disk", n),
            vm: (n < 3 * VMS).then(|| VmUid::from_bytes(u128::from(n / 3).to_be_bytes())),
            size: Bytes::mib(1),
            role: DiskRole::Data,
            importing: false,
            importer: None,
            extents: vec![ExtentRun {
                start: Lba(start + n * 256),
                length: Bytes::mib(1),
            }],
        })
    });
    vms.chain(disks)
}

#[test]
fn ten_thousand_vms_and_a_hundred_thousand_disks_have_room_and_are_recovered() {
    let request = FormatRequest {
        slot_count: SLOTS_MAX,
        device_bytes: 1 << 40,
        ..request()
    };
    let mut store = MemStore::new(request.device_bytes / 4096);
    let superblock = make_volume(&mut store, &request, Some(node(1))).unwrap();
    let mut recovered = recover(&mut store, &superblock).unwrap();
    for row in rows(&superblock) {
        recovered.metadata.apply(&row).unwrap();
    }
    let term = (SlotId(0), CoordinatorEpoch(1));
    let nothing = BTreeSet::new();
    Log::start(&mut store, &superblock, &recovered, term, &nothing).unwrap();
    let found: Metadata = recover(&mut store, &superblock).unwrap().metadata;
    assert_eq!(found.row_count(), 1 + VMS + DISKS);
    assert!(found == recovered.metadata);
}
