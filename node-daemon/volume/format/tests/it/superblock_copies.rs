//! The two copies of the superblock: which one counts, what a crash leaves of a rewrite, and what an earlier volume
//! leaves on the device.

use bascule_types::{Lba, SlotId, VolumeId};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore, Copies, CopyFault, FIRST_COPY, Features, FencingPolicy, FormatError,
    FormatRequest, HeartbeatRecord, MemStore, OpenError, RegionKind, RewriteError, Severity,
    StaleCopy, Superblock, Timings, WatchdogKind, check_volume, make_volume, plan_repair,
    read_copies, read_superblock, rewrite_superblock, seal_block,
};

use crate::crash_again::{crashed, fail_everywhere};
use crate::fixture::{DEVICE_BYTES, formatted, node, owner, request};

const DEVICE_BLOCKS: u64 = DEVICE_BYTES / 4096;
/// Half as much again.
const GROWN_BLOCKS: u64 = DEVICE_BLOCKS / 2 * 3;
const GARBAGE: [u8; BLOCK_BYTES] = [7; BLOCK_BYTES];

fn write(store: &mut MemStore, lba: Lba, block: &[u8]) {
    store.write(lba, block).unwrap();
    store.flush().unwrap();
}

fn starts_with_magic(store: &mut MemStore, lba: Lba) -> bool {
    let mut block = [0; BLOCK_BYTES];
    store.read(lba, &mut block).unwrap();
    block.starts_with(b"BSCL")
}

/// As a volume of another id on the same device.
fn another(device_bytes: u64) -> FormatRequest {
    FormatRequest {
        volume: VolumeId::from_bytes([0x99; 16]),
        device_bytes,
        ..request()
    }
}

fn with_policy(superblock: &Superblock, out_of_service_taint: bool) -> Superblock {
    let policy = FencingPolicy {
        out_of_service_taint,
        ..superblock.policy
    };
    Superblock {
        policy,
        revision: superblock.revision + 1,
        ..superblock.clone()
    }
}

fn copies_of(store: &mut MemStore) -> Copies {
    read_copies(store, Features::KNOWN).unwrap()
}

/// The superblock after a rewrite that changes the policy.
fn rewritten(store: &mut MemStore, superblock: &Superblock) -> Superblock {
    let next = with_policy(superblock, true);
    rewrite_superblock(store, &next, Features::KNOWN).unwrap();
    next
}

/// What a power loss leaves that tears every block under way behind its first `cut` bytes; the rest of the
/// block, or these bytes, are those of before.
fn torn(store: &MemStore, cut: usize, is_front_new: bool) -> MemStore {
    let mut device = store.crashed(|_| false);
    for (lba, new) in store.unflushed() {
        let mut block = [0; BLOCK_BYTES];
        device.read(*lba, &mut block).unwrap();
        let part = if is_front_new {
            0..cut
        } else {
            cut..BLOCK_BYTES
        };
        block[part.clone()].copy_from_slice(&new[part]);
        device.write(*lba, &block).unwrap();
    }
    device.flush().unwrap();
    device
}

/// Every device that a power loss may leave of `store`: any subset of what is under way, or all of it torn.
fn left_of(store: &MemStore, cuts: &[usize]) -> Vec<MemStore> {
    let mut late = store.clone();
    late.land_failed(|_| true);
    let mut devices = Vec::new();
    for store in [store, &late] {
        devices.extend(crashed(store).into_iter().map(|(device, _)| device));
        for cut in cuts {
            devices.extend([true, false].map(|is_front_new| torn(store, *cut, is_front_new)));
        }
    }
    devices
}

/// A rewrite of a volume with superblock `before`, interrupted everywhere: the devices that this leaves, each with the
/// superblock that it opens with.
fn interrupted(
    device: &MemStore,
    before: &Superblock,
    cuts: &[usize],
    story: &str,
) -> Vec<(MemStore, Superblock)> {
    let after = with_policy(before, !before.policy.out_of_service_taint);
    let mut left = Vec::new();
    fail_everywhere(device, |store, budget| {
        let done = rewrite_superblock(store, &after, Features::KNOWN);
        for mut device in left_of(store, cuts) {
            let opened = read_superblock(&mut device)
                .unwrap_or_else(|error| panic!("{story}, failed after {budget}: {error}"));
            let allowed = opened == after || (done.is_err() && opened == *before);
            assert!(allowed, "{story}, failed after {budget}: {opened:?}");
            left.push((device, opened));
        }
        done.is_ok()
    });
    left
}

/// A volume whose superblock was rewritten once, with both copies intact, or one of them damaged or out of date.
fn rewritten_volumes() -> (Superblock, Vec<(MemStore, String)>) {
    let (mut store, older) = formatted();
    let current = rewritten(&mut store, &older);
    assert_eq!(current.revision, older.revision + 1);
    let mut volumes = vec![(store.clone(), "both intact".to_owned())];
    for lba in current.copy_lbas() {
        let older = seal_block(&older, older.place(lba));
        for (what, block) in [
            ("blank", [0; BLOCK_BYTES]),
            ("damaged", GARBAGE),
            ("out of date", older),
        ] {
            let mut store = store.clone();
            write(&mut store, lba, &block);
            volumes.push((store, format!("{what} at block {}", lba.0)));
        }
    }
    (current, volumes)
}

#[test]
fn i6_a_rewrite_that_ends_anywhere_leaves_the_old_or_the_new_superblock() {
    let (current, volumes) = rewritten_volumes();
    let everywhere: Vec<usize> = (8..512).step_by(8).collect();
    let somewhere = [8, 56, 240, 504];
    let mut crashes = 0;
    for (device, story) in volumes {
        assert_eq!(read_superblock(&mut device.clone()).unwrap(), current);
        crashes += interrupted(&device, &current, &everywhere, &story).len();
        for (device, opened) in interrupted(&device, &current, &somewhere, &story) {
            let again = format!("{story}, and again");
            crashes += interrupted(&device, &opened, &somewhere, &again).len();
        }
    }
    println!("{crashes} crashes");
    assert!(crashes > 10_000, "only {crashes} crashes");
}

#[test]
fn the_next_rewrite_and_a_repair_mend_a_copy_that_is_damaged_or_out_of_date() {
    let (current, volumes) = rewritten_volumes();
    for (store, story) in volumes.into_iter().skip(1) {
        let mut repaired = store.clone();
        let repair = plan_repair(&mut repaired).unwrap();
        assert_eq!(repair.steps.len(), 1, "{story}");
        repair.perform(&mut repaired).unwrap();
        let copies = copies_of(&mut repaired);
        assert_eq!(
            (copies.current, copies.stale),
            (current.clone(), None),
            "{story}"
        );
        for next in [current.clone(), with_policy(&current, false)] {
            // The one that counts already, and a later one.
            let mut store = store.clone();
            rewrite_superblock(&mut store, &next, Features::KNOWN).unwrap();
            let copies = copies_of(&mut store);
            assert_eq!((copies.current, copies.stale), (next, None), "{story}");
        }
    }
}

#[test]
fn one_damaged_superblock_is_survived_and_reported_and_two_are_an_error() {
    let (store, superblock) = formatted();
    for lba in superblock.copy_lbas() {
        let mut store = store.clone();
        write(&mut store, lba, &GARBAGE);
        let copies = copies_of(&mut store);
        let fault = CopyFault::Damaged(FormatError::Magic);
        assert_eq!(copies.stale, Some(StaleCopy { lba, fault }));
        assert_eq!(copies.current, superblock);
        let report = check_volume(&mut store).unwrap();
        assert_eq!(report.worst(), Some(Severity::Warning));
        let said = report.findings[0].to_string();
        assert!(said.contains(&format!("block {}: ", lba.0)), "{said}");
    }
    let mut store = store;
    for lba in superblock.copy_lbas() {
        write(&mut store, lba, &GARBAGE);
    }
    let error = read_superblock(&mut store).unwrap_err();
    assert!(matches!(error, OpenError::NotAVolume), "{error}");
}

#[test]
fn an_older_copy_is_reported_with_its_revision() {
    let (mut store, older) = formatted();
    let current = rewritten(&mut store, &older);
    for lba in current.copy_lbas() {
        let mut store = store.clone();
        write(&mut store, lba, &seal_block(&older, older.place(lba)));
        let copies = copies_of(&mut store);
        assert_eq!(copies.current, current);
        let report = check_volume(&mut store).unwrap();
        let said: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
        let lba = lba.0;
        let expected =
            format!("warning: superblock copy at block {lba}: out of date, it has revision 1");
        assert_eq!(said, [expected]);
    }
}

#[test]
fn two_intact_superblocks_that_contradict_each_other_are_refused() {
    let (store, superblock) = formatted();
    let last = superblock.last_copy();
    let open_with = |copy: &Superblock| {
        let mut store = store.clone();
        write(&mut store, last, &seal_block(copy, copy.place(last)));
        read_superblock(&mut store)
    };
    // A copy of another revision is the remainder of an unfinished rewrite.
    let newer = with_policy(&superblock, true);
    assert_eq!(open_with(&newer).unwrap(), newer);
    let other = Superblock {
        revision: superblock.revision,
        ..newer.clone()
    };
    let error = open_with(&other).unwrap_err();
    assert!(
        matches!(error, OpenError::CopiesDiffer { revision: 1 }),
        "{error}"
    );
    let foreign = Superblock {
        volume: VolumeId::from_bytes([0x99; 16]),
        revision: superblock.revision + 1,
        ..superblock.clone()
    };
    let error = open_with(&foreign).unwrap_err();
    let named = matches!(
        &error,
        OpenError::TwoVolumes { first, last }
            if (*first, *last) == (superblock.volume, foreign.volume)
    );
    assert!(named, "{error}");
}

/// A release that raises a feature and is interrupted: the copy that it did not reach still allows everything.
#[test]
fn an_intact_copy_of_a_later_release_refuses_the_volume_whatever_the_other_one_says() {
    let (store, superblock) = formatted();
    let features = Features::from_bits(1 << 63);
    let later = Superblock {
        features,
        ..with_policy(&superblock, true)
    };
    for lba in superblock.copy_lbas() {
        let mut store = store.clone();
        write(&mut store, lba, &seal_block(&later, later.place(lba)));
        let error = read_superblock(&mut store).unwrap_err();
        let unknown = FormatError::Features(features);
        assert!(matches!(error, OpenError::Newer(cause) if cause == unknown));
        let planned = plan_repair(&mut store);
        assert!(matches!(planned, Err(OpenError::Newer(_))), "{planned:?}");
    }
}

#[test]
fn the_last_superblock_is_found_although_the_device_has_grown() {
    let (mut store, superblock) = formatted();
    store.resize(GROWN_BLOCKS);
    let copies = copies_of(&mut store);
    assert_eq!((&copies.current, copies.stale), (&superblock, None));
    let current = rewritten(&mut store, &superblock);
    let mut without_last = store.clone();
    write(&mut without_last, superblock.last_copy(), &GARBAGE);
    plan_repair(&mut without_last)
        .unwrap()
        .perform(&mut without_last)
        .unwrap();
    // Nothing says where it is without the first, and nothing else is taken for it.
    let mut without_first = without_last;
    write(&mut without_first, FIRST_COPY, &GARBAGE);
    let error = read_superblock(&mut without_first).unwrap_err();
    assert!(matches!(error, OpenError::NotAVolume), "{error}");
    without_first.resize(DEVICE_BLOCKS + 255);
    assert_eq!(read_superblock(&mut without_first).unwrap(), current);
}

#[test]
fn a_device_that_was_cut_is_refused() {
    let (store, superblock) = formatted();
    for missing in [1, 255, 256, 300, 4096] {
        let mut store = store.clone();
        store.resize(DEVICE_BLOCKS - missing);
        let error = read_superblock(&mut store).unwrap_err();
        let blocks = superblock.blocks;
        assert!(matches!(error, OpenError::Truncated { blocks: found } if found == blocks));
    }
}

/// The first copy is lost, and the device ends where an earlier volume did.
#[test]
fn format_erases_the_last_superblock_of_an_earlier_volume_within_the_device() {
    let shorter = DEVICE_BYTES;
    let longer = GROWN_BLOCKS * 4096;
    for (earlier, later, is_first_lost) in [
        (shorter, longer, false),
        (longer, shorter, false),
        (longer, shorter, true),
    ] {
        let mut store = MemStore::new(earlier / 4096);
        let before = make_volume(&mut store, &another(earlier), None).unwrap();
        store.resize(GROWN_BLOCKS);
        if is_first_lost {
            write(&mut store, FIRST_COPY, &GARBAGE);
        }
        let now = FormatRequest {
            device_bytes: later,
            ..request()
        };
        let superblock = make_volume(&mut store, &now, Some(node(1))).unwrap();
        assert_ne!(before.last_copy(), superblock.last_copy());
        assert!(!starts_with_magic(&mut store, before.last_copy()));
        assert_eq!(read_superblock(&mut store).unwrap(), superblock);
        write(&mut store, FIRST_COPY, &GARBAGE);
        store.resize(earlier / 4096);
        let error = read_superblock(&mut store).unwrap_err();
        assert!(matches!(error, OpenError::NotAVolume), "{error}");
    }
}

#[test]
fn format_leaves_a_block_alone_that_is_no_superblock() {
    let mut store = MemStore::new(GROWN_BLOCKS);
    let end = Lba(GROWN_BLOCKS - 256);
    write(&mut store, end, &GARBAGE);
    make_volume(&mut store, &request(), Some(node(1))).unwrap();
    let mut block = [0; BLOCK_BYTES];
    store.read(end, &mut block).unwrap();
    assert!(block == GARBAGE);
}

fn heartbeat(slot: u16) -> HeartbeatRecord {
    HeartbeatRecord {
        node: node(1),
        boot: [1; 16],
        owner: owner(slot, 1),
        sequence: 1,
        watchdog: WatchdogKind::None,
        detached: false,
        timings: Timings::DEFAULT,
        features: Features::NONE,
        address: String::new(),
    }
}

#[test]
fn the_last_superblock_alone_is_refused_beside_heartbeats_of_another_volume() {
    let (store, superblock) = formatted();
    let foreign = VolumeId::from_bytes([0x99; 16]);
    for slot in [0, 3] {
        let lba = superblock.heartbeat_lba(SlotId(slot), 1);
        let mut own = superblock.place(lba);
        for (volume, is_refused) in [(superblock.volume, false), (foreign, true)] {
            own.volume = volume;
            let mut store = store.clone();
            write(&mut store, lba, &seal_block(&heartbeat(slot), own));
            // With the first superblock it is damage, and an attached node reports it.
            assert_eq!(read_superblock(&mut store).unwrap(), superblock);
            write(&mut store, FIRST_COPY, &GARBAGE);
            match read_superblock(&mut store) {
                Ok(found) => assert!(!is_refused && found == superblock),
                Err(OpenError::ForeignHeartbeats { last, found }) => {
                    assert!(is_refused);
                    assert_eq!((last, found), (superblock.volume, foreign));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// A copy that lies where the device ends, of a volume that ends elsewhere.
#[test]
fn a_last_superblock_that_names_another_length_does_not_count() {
    let (mut store, superblock) = formatted();
    let longer = another(GROWN_BLOCKS * 4096).lay_out().unwrap();
    let lba = superblock.last_copy();
    write(&mut store, lba, &seal_block(&longer, longer.place(lba)));
    let copies = copies_of(&mut store);
    assert_eq!(copies.current, superblock);
    assert!(copies.stale.is_some());
    write(&mut store, FIRST_COPY, &GARBAGE);
    let error = read_superblock(&mut store).unwrap_err();
    assert!(matches!(error, OpenError::Damaged(_)), "{error}");
}

#[test]
fn a_superblock_with_a_region_in_the_first_or_the_last_mib_or_with_half_a_mib_is_refused() {
    let (_, superblock) = formatted();
    let parse = |superblock: &Superblock| {
        let place = superblock.place(FIRST_COPY);
        Superblock::parse_copy(&seal_block(superblock, place), FIRST_COPY)
    };
    let changed = |change: &dyn Fn(&mut Superblock)| {
        let mut changed = superblock.clone();
        change(&mut changed);
        parse(&changed)
    };
    assert_eq!(changed(&|_| {}), Ok(superblock.clone()));
    let regions = Err(FormatError::Field("regions"));
    let last = superblock.regions.len() - 1;
    assert_eq!(superblock.regions[last].kind, RegionKind::Extents);
    assert_eq!(changed(&|s| s.regions[last].blocks += 1), regions);
    assert_eq!(changed(&|s| s.regions[0].start = Lba(255)), regions);
    let size = Err(FormatError::Field("size of the volume"));
    assert_eq!(changed(&|s| s.blocks += 128), size);
    assert!(changed(&|s| s.blocks += 256).is_ok());
}

#[test]
fn a_rewrite_starts_from_what_counts_changes_no_layout_and_writes_nothing_that_no_reader_accepts() {
    let (mut store, first) = formatted();
    let current = rewritten(&mut store, &first);
    let mut longer = with_policy(&current, false);
    longer.blocks += 256;
    let mut moved = with_policy(&current, false);
    moved.regions[0].start = Lba(512);
    let same_revision = with_policy(&first, false);
    let mut older = with_policy(&first, false);
    older.revision = 0;
    for (store, changed) in [
        (&mut store.clone(), &same_revision),
        (&mut store.clone(), &older),
        (&mut store.clone(), &longer),
        (&mut store.clone(), &moved),
    ] {
        // The first write would be another error.
        store.fail_after(0);
        let error = rewrite_superblock(store, changed, Features::KNOWN).unwrap_err();
        assert!(matches!(error, RewriteError::Conflict), "{error}");
    }
    let mut unknown = with_policy(&current, false);
    unknown.features = Features::from_bits(1);
    let mut invalid = with_policy(&current, false);
    invalid.timings.watch = invalid.timings.lease;
    store.fail_after(0);
    let error = rewrite_superblock(&mut store, &unknown, Features::KNOWN).unwrap_err();
    assert!(matches!(error, RewriteError::Unknown(_)), "{error}");
    let error = rewrite_superblock(&mut store, &invalid, Features::KNOWN).unwrap_err();
    assert!(matches!(error, RewriteError::Invalid(_)), "{error}");
}
