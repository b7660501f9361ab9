//! The coordinator's decisions: which changes it grants and which it refuses.

use crate::fixture::{Cluster, name, node, owner, vm};
use bascule_types::{
    AdminConfirmation, Answer, AttemptId, Bytes, Change, DiskId, DiskRole, DiskRow, Epoch,
    FenceProof, MissingProof, Refusal, Table,
};

const PROOF: FenceProof = FenceProof::SafeTimeElapsed {
    watched_ms: 26_000,
    required_ms: 26_000,
};

fn take_over(epoch: u64) -> Change {
    Change::TakeOver {
        vm: vm(1),
        from: owner(0, 1),
        epoch: Epoch(epoch),
        to: owner(1, 1),
    }
}

fn transfer(attempt: u8) -> Change {
    Change::Transfer {
        vm: vm(1),
        from: owner(0, 1),
        epoch: Epoch(1),
        to: owner(1, 1),
        attempt: AttemptId::from_bytes([attempt; 16]),
    }
}

fn rejoin(generation: u64, rebooted: bool) -> Change {
    Change::Rejoin {
        node: node(1),
        from: owner(0, generation),
        rebooted,
    }
}

fn create_disk(v: u8, disk: &str, mib: u32) -> Change {
    Change::CreateDisk {
        vm: vm(v),
        name: name(disk),
        size: Bytes::mib(mib),
        role: DiskRole::Data,
        importing: true,
    }
}

fn disk_of(answer: Answer) -> DiskRow {
    match answer {
        Answer::Disk(row) => row,
        other => panic!("{other:?}"),
    }
}

#[test]
fn acquiring_a_vm_without_owner_raises_its_epoch_and_a_stale_epoch_is_refused() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    assert_eq!(cluster.row(1).epoch, Epoch(1));
    let refused = cluster.acquire(2, 1, 0, owner(1, 1));
    let (owner_now, epoch) = (owner(0, 1), Epoch(1));
    assert_eq!(
        refused,
        Err(Refusal::OwnedBy {
            owner: owner_now,
            epoch
        })
    );
    let release = Change::Release {
        vm: vm(1),
        from: owner_now,
        epoch,
    };
    cluster.ask(1, &release).unwrap();
    let refused = cluster.acquire(2, 1, 0, owner(1, 1));
    assert_eq!(refused, Err(Refusal::EpochIs { epoch }));
    cluster.acquire(2, 1, 1, owner(1, 1)).unwrap();
    assert_eq!(cluster.row(1).epoch, Epoch(2));
}

/// The coordinator used to panic, and with it its process: no epoch follows the last one.
#[test]
fn a_request_that_names_the_last_possible_epoch_is_refused() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let (source, destination, last) = (owner(0, 1), owner(1, 1), Epoch(u64::MAX));
    let held_by = |owner, epoch| {
        Err(Refusal::OwnedBy {
            owner,
            epoch: Epoch(epoch),
        })
    };
    assert_eq!(cluster.acquire(1, 1, last.0, source), held_by(source, 1));
    let take_over = Change::TakeOver {
        vm: vm(1),
        from: destination,
        epoch: last,
        to: source,
    };
    assert_eq!(cluster.ask(1, &take_over), held_by(source, 1));
    cluster.ask(1, &transfer(7)).unwrap();
    let again = Change::Transfer {
        vm: vm(1),
        from: source,
        epoch: last,
        to: destination,
        attempt: AttemptId::from_bytes([7; 16]),
    };
    assert_eq!(cluster.ask(1, &again), held_by(destination, 2));
}

#[test]
fn a_node_without_a_valid_lease_cannot_become_an_owner() {
    let mut cluster = Cluster::with_two_nodes();
    cluster.create_vm(1);
    cluster.seen.alive.remove(&owner(1, 1));
    let refused = cluster.acquire(1, 1, 0, owner(1, 1));
    assert_eq!(refused, Err(Refusal::LeaseInvalid { owner: owner(1, 1) }));
    let refused = cluster.acquire(1, 1, 0, owner(1, 2));
    assert_eq!(refused, Err(Refusal::StaleOwner { owner: owner(1, 2) }));
}

#[test]
fn a_repeated_transfer_is_recognised_by_its_attempt_even_after_the_destination_rejoined() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    cluster.ask(1, &transfer(7)).unwrap();
    assert_eq!(cluster.row(1).owner, Some(owner(1, 1)));
    cluster.seen.alive.insert(owner(1, 2));
    let rejoin = Change::Rejoin {
        node: node(2),
        from: owner(1, 1),
        rebooted: false,
    };
    let answer = cluster.ask(2, &rejoin).unwrap();
    assert_eq!(
        answer,
        Answer::Slot {
            owner: owner(1, 2),
            kept: vec![vm(1)]
        }
    );
    let Ok(Answer::Row(row)) = cluster.ask(1, &transfer(7)) else {
        panic!("the same attempt is granted again");
    };
    assert_eq!((row.owner, row.epoch), (Some(owner(1, 2)), Epoch(2)));
    let refused = cluster.ask(1, &transfer(8));
    assert!(
        matches!(refused, Err(Refusal::OwnedBy { .. })),
        "{refused:?}"
    );
}

#[test]
fn only_the_owners_node_releases_or_transfers_a_vm() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let owner = owner(0, 1);
    let only = Err(Refusal::OwnersNodeOnly { owner });
    assert_eq!(cluster.ask(2, &transfer(1)), only);
    let release = Change::Release {
        vm: vm(1),
        from: owner,
        epoch: Epoch(1),
    };
    assert_eq!(cluster.ask(2, &release), only);
    cluster.ask(1, &release).unwrap();
}

#[test]
fn a_takeover_needs_a_proof_and_records_it() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let victim = owner(0, 1);
    let missing = MissingProof::Alive;
    assert_eq!(
        cluster.ask(2, &take_over(1)),
        Err(Refusal::NotFenced { victim, missing })
    );
    cluster.seen.alive.remove(&victim);
    cluster.seen.proofs.insert(victim, PROOF);
    cluster.ask(2, &take_over(1)).unwrap();
    assert_eq!(cluster.row(1).owner, Some(owner(1, 1)));
    assert_eq!(cluster.metadata.fence(victim).unwrap().proof, PROOF);
}

#[test]
fn a_fenced_node_keeps_no_vm_and_cannot_commit_a_migration() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let victim = owner(0, 1);
    cluster.seen.alive.remove(&victim);
    let confirmation = AdminConfirmation::Confirmed;
    let confirm = Change::ConfirmFenced {
        victim,
        confirmation,
    };
    cluster.ask(2, &confirm).unwrap();
    let refused = cluster.ask(1, &transfer(1));
    assert_eq!(refused, Err(Refusal::Fenced { owner: victim }));
    cluster.seen.alive.insert(owner(0, 2));
    let answer = cluster.ask(1, &rejoin(1, false)).unwrap();
    let kept = Vec::new();
    let new = owner(0, 2);
    assert_eq!(answer, Answer::Slot { owner: new, kept });
    assert_eq!(cluster.row(1).owner, None, "its row is free to acquire");
}

#[test]
fn a_confirmation_is_refused_while_the_heartbeat_is_alive_and_binds_one_generation() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let confirmation = AdminConfirmation::Confirmed;
    let victim = owner(0, 1);
    let confirm = Change::ConfirmFenced {
        victim,
        confirmation,
    };
    let missing = MissingProof::Alive;
    assert_eq!(
        cluster.ask(2, &confirm),
        Err(Refusal::NotFenced { victim, missing })
    );
    // Regression: a coordinator that could not read took a living node for a dead one.
    cluster.seen.unread = true;
    assert_eq!(
        cluster.ask(2, &confirm),
        Err(Refusal::NotFenced { victim, missing })
    );
    let victim = owner(0, 9);
    let confirm = Change::ConfirmFenced {
        victim,
        confirmation,
    };
    assert_eq!(
        cluster.ask(2, &confirm),
        Err(Refusal::StaleOwner { owner: victim })
    );
    let confirmation = AdminConfirmation::OutOfServiceTaint;
    let confirm = Change::ConfirmFenced {
        victim,
        confirmation,
    };
    assert_eq!(cluster.ask(2, &confirm), Err(Refusal::NotAllowed));
}

#[test]
fn a_rejoin_in_the_same_boot_keeps_vms_and_one_after_a_reboot_releases_them() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    cluster.seen.alive.insert(owner(0, 2));
    cluster.ask(1, &rejoin(1, false)).unwrap();
    assert_eq!(cluster.row(1).owner, Some(owner(0, 2)));
    assert_eq!(cluster.row(1).epoch, Epoch(1));
    cluster.seen.alive.insert(owner(0, 3));
    cluster.ask(1, &rejoin(2, true)).unwrap();
    assert_eq!(cluster.row(1).owner, None);
}

#[test]
fn a_disk_is_filled_by_one_node_at_a_time() {
    let mut cluster = Cluster::with_two_nodes();
    cluster.create_vm(1);
    let create = create_disk(1, "shop/data", 4);
    let disk = disk_of(cluster.ask(1, &create).unwrap());
    assert!(disk.importing);
    let elsewhere = Refusal::ImportedElsewhere { owner: owner(0, 1) };
    assert_eq!(cluster.ask(2, &create), Err(elsewhere));
    let finish = Change::FinishImport {
        disk: disk.disk,
        length: None,
    };
    assert_eq!(cluster.ask(2, &finish), Err(elsewhere));
    // The first importer dies: only its fence lets another one fill the disk.
    let victim = owner(0, 1);
    cluster.seen.alive.remove(&victim);
    assert_eq!(cluster.ask(2, &create), Err(elsewhere));
    let confirmation = AdminConfirmation::Confirmed;
    cluster
        .ask(
            2,
            &Change::ConfirmFenced {
                victim,
                confirmation,
            },
        )
        .unwrap();
    cluster.ask(2, &create).unwrap();
    let done = disk_of(cluster.ask(2, &finish).unwrap());
    assert!(!done.importing);
}

#[test]
fn a_boot_image_is_cut_to_its_length_and_its_disk_is_found_again() {
    let mut cluster = Cluster::with_two_nodes();
    cluster.create_vm(1);
    let create = Change::CreateDisk {
        vm: vm(1),
        name: name("shop/web.boot-kernel"),
        size: Bytes::mib(16),
        role: DiskRole::Kernel,
        importing: true,
    };
    let before = cluster.metadata.free();
    let disk = disk_of(cluster.ask(1, &create).unwrap()).disk;
    let length = Some(Bytes(3 * (1 << 20) + 17));
    let done = disk_of(
        cluster
            .ask(1, &Change::FinishImport { disk, length })
            .unwrap(),
    );
    assert_eq!(Some(done.size), length);
    assert_eq!(before.0 - cluster.metadata.free().0, 4 << 20);
    assert_eq!(disk_of(cluster.ask(1, &create).unwrap()), done);
}

#[test]
fn a_kept_disk_is_attached_within_its_own_namespace_only() {
    let mut cluster = Cluster::with_two_nodes();
    cluster.create_vm(1);
    let disk = disk_of(cluster.ask(1, &create_disk(1, "shop/data", 4)).unwrap());
    let finish = Change::FinishImport {
        disk: disk.disk,
        length: None,
    };
    cluster.ask(1, &finish).unwrap();
    cluster.ask(1, &Change::DeleteVm { vm: vm(1) }).unwrap();
    let kept = cluster.metadata.disk(disk.disk).unwrap();
    assert_eq!(kept.vm, None);
    let other = Change::CreateVm {
        vm: vm(2),
        name: name("bank/web"),
        spec_digest: [0; 32],
    };
    cluster.ask(1, &other).unwrap();
    cluster.create_vm(3);
    let attach = |v| Change::AttachDisk {
        name: name("shop/data"),
        vm: vm(v),
    };
    assert_eq!(cluster.ask(1, &attach(2)), Err(Refusal::OtherNamespace));
    cluster.ask(1, &attach(3)).unwrap();
    assert_eq!(
        cluster.ask(1, &create_disk(1, "shop/data", 4)),
        Err(Refusal::NoSuchVm)
    );
    assert_eq!(
        cluster.ask(1, &create_disk(2, "shop/data", 4)),
        Err(Refusal::NameTaken)
    );
    assert_eq!(
        cluster.ask(1, &create_disk(3, "shop/data", 5)),
        Err(Refusal::DiskDiffers)
    );
}

#[test]
fn a_full_volume_reports_what_is_free_and_what_is_needed() {
    let mut cluster = Cluster::with_two_nodes();
    cluster.create_vm(1);
    let free = cluster.metadata.free();
    let refused = cluster.ask(1, &create_disk(1, "shop/huge", 4096));
    let needed = Bytes::gib(4);
    assert_eq!(refused, Err(Refusal::Full { free, needed }));
    let disk = disk_of(cluster.ask(1, &create_disk(1, "shop/data", 8)).unwrap());
    assert_eq!(cluster.metadata.free().0, free.0 - Bytes::mib(8).0);
    let gone = Change::DeleteDisk { disk: disk.disk };
    cluster.ask(1, &gone).unwrap();
    assert_eq!(cluster.metadata.free(), free);
}

#[test]
fn no_two_rows_ever_share_an_extent() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let mut disks: Vec<DiskId> = Vec::new();
    for n in 0..9 {
        let change = create_disk(1, &format!("shop/disk-{n}"), 2 + n % 3);
        disks.push(disk_of(cluster.ask(1, &change).unwrap()).disk);
    }
    let release = Change::Release {
        vm: vm(1),
        from: owner(0, 1),
        epoch: Epoch(1),
    };
    cluster.ask(1, &release).unwrap();
    for disk in disks.iter().step_by(2) {
        cluster.ask(1, &Change::DeleteDisk { disk: *disk }).unwrap();
    }
    cluster
        .ask(1, &create_disk(1, "shop/scattered", 14))
        .unwrap();
    let mut runs: Vec<_> = cluster.metadata.disks().flat_map(|d| &d.extents).collect();
    runs.sort_by_key(|run| run.start);
    for pair in runs.windows(2) {
        let end = pair[0].start.0 + pair[0].length.0 / 4096;
        assert!(end <= pair[1].start.0, "{pair:?}");
    }
}

#[test]
fn saved_state_is_reserved_finished_and_dropped_by_the_owner() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let from = owner(0, 1);
    let epoch = Epoch(1);
    let reserve = |mib| Change::ReserveSavedState {
        vm: vm(1),
        from,
        epoch,
        size: Bytes::mib(mib),
    };
    cluster.ask(1, &reserve(8)).unwrap();
    let finish = Change::FinishSavedState {
        vm: vm(1),
        from,
        epoch,
        length: Bytes::mib(7),
        crc32c: 5,
    };
    let Ok(Answer::SavedState(saved)) = cluster.ask(1, &finish) else {
        panic!("granted");
    };
    assert_eq!(saved.complete.unwrap().length, Bytes::mib(7));
    let free = cluster.metadata.free();
    let other = Change::DropSavedState {
        vm: vm(1),
        from: owner(1, 1),
        epoch,
    };
    assert!(matches!(
        cluster.ask(2, &other),
        Err(Refusal::OwnedBy { .. })
    ));
    // A quick migration's next owner restores the state, and then frees it.
    let to = owner(1, 1);
    let moved = Change::Transfer {
        vm: vm(1),
        from,
        epoch,
        to,
        attempt: AttemptId::from_bytes([3; 16]),
    };
    cluster.ask(1, &moved).unwrap();
    let restored = Change::DropSavedState {
        vm: vm(1),
        from: to,
        epoch: Epoch(2),
    };
    cluster.ask(2, &restored).unwrap();
    assert!(cluster.metadata.free() > free);
    let larger = Change::ReserveSavedState {
        vm: vm(1),
        from: to,
        epoch: Epoch(2),
        size: Bytes::mib(4096),
    };
    assert!(matches!(cluster.ask(2, &larger), Err(Refusal::Full { .. })));
}

/// Regression: neither request named its epoch, and a copy that was decided late deleted the complete
/// state of a later attempt, and with it the guest's memory.
#[test]
fn i3_a_late_copy_of_a_reserve_or_drop_leaves_a_complete_saved_state() {
    let mut cluster = Cluster::with_two_nodes().with_running_vm();
    let from = owner(0, 1);
    let reserve = |epoch| Change::ReserveSavedState {
        vm: vm(1),
        from,
        epoch,
        size: Bytes::mib(8),
    };
    let drop = |epoch| Change::DropSavedState {
        vm: vm(1),
        from,
        epoch,
    };
    // An attempt that was given up, and the same owner in the next epoch.
    cluster.ask(1, &reserve(Epoch(1))).unwrap();
    cluster.ask(1, &drop(Epoch(1))).unwrap();
    let release = Change::Release {
        vm: vm(1),
        from,
        epoch: Epoch(1),
    };
    cluster.ask(1, &release).unwrap();
    cluster.acquire(1, 1, 1, from).unwrap();
    cluster.ask(1, &reserve(Epoch(2))).unwrap();
    let finish = Change::FinishSavedState {
        vm: vm(1),
        from,
        epoch: Epoch(2),
        length: Bytes::mib(7),
        crc32c: 5,
    };
    cluster.ask(1, &finish).unwrap();
    for late in [reserve(Epoch(1)), drop(Epoch(1))] {
        let refused = cluster.ask(1, &late);
        assert!(matches!(refused, Err(Refusal::OwnedBy { .. })), "{late:?}");
    }
    for late in [reserve(Epoch(2)), drop(Epoch(2))] {
        assert_eq!(cluster.ask(1, &late), Err(Refusal::SavedStateComplete));
    }
    let saved = cluster.metadata.saved(vm(1)).unwrap();
    assert!(saved.complete.is_some());
}

#[test]
fn a_node_without_a_free_slot_is_refused() {
    let mut cluster = Cluster::with_two_nodes();
    cluster.join(3);
    cluster.join(4);
    let what = Table::Slots;
    let fifth = Change::RegisterNode { node: node(5) };
    assert_eq!(cluster.ask(1, &fifth), Err(Refusal::TableFull { what }));
}
