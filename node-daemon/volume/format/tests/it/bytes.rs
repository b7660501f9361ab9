//! The bytes of format version 2: golden files, round trips, hostile input.

use std::fmt::Write as _;
use std::time::Duration;

use crate::fixture::{formatted, owner, request};
use bascule_types::{
    AdminConfirmation, AttemptId, Bytes, ClusterId, DiskId, DiskRole, DiskRow, Epoch, ExtentRun,
    FenceProof, FenceRow, Generation, Lba, NodeUid, RowName, SavedStateRow, SavedStateSum, SlotId,
    VmRow, VmUid, VolumeId,
};
use bascule_volume_format::{
    Accepted, BlockStore, CheckpointHead, CheckpointId, CheckpointRow, CoordinatorEpoch,
    FIRST_COPY, Features, FormatError, HeartbeatRecord, JournalBlock, LeaderBlock, MetaRecord,
    OpenError, PaxosBlock, Place, RUNS_MAX, Record, RegionKind, SlotRow, Superblock, Timings,
    UnfinishedFormat, WatchdogKind, open, read_superblock, seal, seal_block,
};
use proptest::prelude::*;

const PLACE: Place = Place {
    volume: VolumeId::from_bytes([0x11; 16]),
    lba: Lba(0x1234),
};

fn heartbeat() -> HeartbeatRecord {
    HeartbeatRecord {
        node: NodeUid::from_bytes([0x33; 16]),
        boot: [0x44; 16],
        owner: owner(3, 7),
        sequence: 9,
        watchdog: WatchdogKind::Hardware,
        detached: false,
        timings: Timings::DEFAULT,
        features: Features::from_bits(0x0908_0706_0504_0302),
        address: "192.0.2.7:7440".to_owned(),
    }
}

#[test]
fn the_longest_socket_address_of_either_family_fits_a_heartbeat() {
    for text in [
        "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff%4294967295]:65535",
        "[::ffff:255.255.255.255%4294967295]:65535",
        "255.255.255.255:65535",
    ] {
        let address: std::net::SocketAddr = text.parse().unwrap();
        assert_eq!(address.to_string(), text);
        round_trip(&HeartbeatRecord {
            address: address.to_string(),
            ..heartbeat()
        });
    }
}

fn paxos() -> PaxosBlock {
    PaxosBlock {
        instance: CoordinatorEpoch(5),
        writer: owner(2, 6),
        mbal: 34,
        accepted: Some(Accepted {
            bal: 18,
            value: owner(1, 4),
        }),
    }
}

const CHECKPOINT: CheckpointId = CheckpointId {
    epoch: CoordinatorEpoch(5),
    number: 2,
};

fn vm_row() -> VmRow {
    VmRow {
        vm: VmUid::from_bytes([0x55; 16]),
        name: RowName::new("shop/web").unwrap(),
        owner: Some(owner(3, 7)),
        epoch: Epoch(12),
        attempt: Some(AttemptId::from_bytes([0x66; 16])),
        spec_digest: [0x77; 32],
    }
}

fn widest_disk() -> DiskRow {
    let run = |n: u64| ExtentRun {
        start: Lba(n * 512),
        length: Bytes::mib(1),
    };
    DiskRow {
        disk: DiskId::from_bytes([0x88; 16]),
        name: RowName::new("x".repeat(RowName::BYTES_MAX)).unwrap(),
        vm: Some(VmUid::from_bytes([0x55; 16])),
        size: Bytes::mib(24),
        role: DiskRole::Initrd,
        importing: true,
        importer: Some(owner(3, 7)),
        extents: (1..=RUNS_MAX as u64).map(run).collect(),
    }
}

/// The sealed bytes in hex, up to the last one that is not zero.
fn hex<R: Record>(record: &R) -> String {
    let bytes = seal(record, PLACE);
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0);
    bytes[..=end].iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn round_trip<R: Record + PartialEq + std::fmt::Debug>(record: &R) {
    let block = seal_block(record, PLACE);
    assert_eq!(&open::<R>(&block, PLACE).unwrap(), record);
}

#[test]
fn golden_bytes_of_every_kind_of_block() {
    let mut superblock = request().lay_out().unwrap();
    superblock.volume = PLACE.volume;
    let vm = MetaRecord::Vm(vm_row());
    let head = CheckpointHead {
        id: CHECKPOINT,
        rows: 3,
        crc32c: 0xDEAD_BEEF,
        follows: Some((
            CheckpointId {
                number: 1,
                ..CHECKPOINT
            },
            384,
        )),
    };
    let row = CheckpointRow {
        id: CHECKPOINT,
        index: 1,
        record: vm.clone(),
    };
    let journal = JournalBlock {
        id: CHECKPOINT,
        sequence: 8,
        position: 1,
        more: true,
        record: vm,
    };
    let leader = LeaderBlock {
        epoch: CoordinatorEpoch(5),
        coordinator: owner(2, 6),
    };
    let unfinished = UnfinishedFormat {
        settle: Duration::from_millis(4000),
    };
    let found = [
        ("superblock", hex(&superblock)),
        ("heartbeat", hex(&heartbeat())),
        ("paxos", hex(&paxos())),
        ("leader", hex(&leader)),
        ("checkpoint head", hex(&head)),
        ("checkpoint row", hex(&row)),
        ("journal", hex(&journal)),
        ("unfinished format", hex(&unfinished)),
    ];
    let found = found.iter().fold(String::new(), |mut text, (kind, hex)| {
        writeln!(text, "{kind} {hex}").unwrap();
        text
    });
    assert_eq!(found, include_str!("golden-v2.txt"));
}

#[test]
fn golden_bytes_of_every_kind_of_row() {
    let found = every_record()
        .iter()
        .fold(String::new(), |mut text, record| {
            let journal = JournalBlock {
                id: CHECKPOINT,
                sequence: 0,
                position: 0,
                more: false,
                record: record.clone(),
            };
            writeln!(text, "{}", &hex(&journal)[132..]).unwrap();
            text
        });
    assert_eq!(found, include_str!("golden-rows-v2.txt"));
}

fn every_record() -> Vec<MetaRecord> {
    let saved = SavedStateRow {
        vm: VmUid::from_bytes([0x55; 16]),
        epoch: Epoch(12),
        extents: widest_disk().extents[..2].to_vec(),
        complete: Some(SavedStateSum {
            length: Bytes(1_000_000),
            crc32c: 7,
        }),
    };
    let proof = FenceProof::SafeTimeElapsed {
        watched_ms: 26_001,
        required_ms: 26_000,
    };
    let fence = FenceRow {
        victim: owner(3, 7),
        proof,
    };
    let confirmation = FenceProof::Administrator(AdminConfirmation::OutOfServiceTaint);
    vec![
        MetaRecord::Slot(SlotRow {
            slot: SlotId(3),
            node: NodeUid::from_bytes([0x33; 16]),
            generation: Generation(7),
            boot: [0x44; 16],
        }),
        MetaRecord::Vm(vm_row()),
        MetaRecord::Disk(widest_disk()),
        MetaRecord::Saved(saved),
        MetaRecord::Fence(fence),
        MetaRecord::Fence(FenceRow {
            proof: confirmation,
            ..fence
        }),
        MetaRecord::Rejoin {
            from: owner(3, 7),
            to: owner(3, 8),
            boot: [0x44; 16],
            keep: true,
        },
        MetaRecord::DeleteVm(VmUid::from_bytes([0x55; 16])),
        MetaRecord::DeleteDisk(DiskId::from_bytes([0x88; 16])),
        MetaRecord::DeleteSaved(VmUid::from_bytes([0x55; 16])),
        MetaRecord::DeleteFence(owner(3, 7)),
        MetaRecord::Features(Features::from_bits(0x0908_0706_0504_0302)),
    ]
}

#[test]
fn the_largest_rows_fit_a_record_and_read_back() {
    for record in every_record() {
        round_trip(&JournalBlock {
            id: CHECKPOINT,
            sequence: 3,
            position: 0,
            more: false,
            record: record.clone(),
        });
        round_trip(&CheckpointRow {
            id: CHECKPOINT,
            index: u64::MAX,
            record,
        });
    }
}

/// The record of a checkpoint row's body with the byte at `offset` of the record set.
fn altered(offset: usize, value: u8) -> Result<CheckpointRow, FormatError> {
    let record = MetaRecord::Vm(vm_row());
    let row = CheckpointRow {
        id: CHECKPOINT,
        index: 1,
        record,
    };
    let mut bytes = seal(&row, PLACE);
    bytes[64 + offset] = value;
    open(&hostile::<CheckpointRow>(&bytes[48..]), PLACE)
}

#[test]
fn a_record_of_another_type_version_or_length_is_refused() {
    let newer = FormatError::Newer { found: 2, known: 1 };
    assert_eq!(altered(0, 12), Err(FormatError::Field("record type")));
    assert_eq!(altered(1, 2), Err(newer));
    let (length, [low, high]) = (276_u16, 276_u16.to_le_bytes());
    assert!(
        altered(2, low).is_ok() && altered(3, high).is_ok(),
        "{length}"
    );
    for wrong in [low - 1, low + 1] {
        assert_eq!(altered(2, wrong), Err(FormatError::Field("record length")));
    }
}

#[test]
fn every_flipped_bit_is_detected() {
    let sealed = seal(&heartbeat(), PLACE);
    for bit in 0..sealed.len() * 8 {
        let mut bytes = sealed;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(open::<HeartbeatRecord>(&bytes, PLACE).is_err(), "bit {bit}");
    }
}

#[test]
fn a_block_of_another_volume_place_or_kind_is_refused_with_a_distinct_error() {
    let sealed = seal(&heartbeat(), PLACE);
    let volume = VolumeId::from_bytes([0x12; 16]);
    let elsewhere = Place { volume, ..PLACE };
    assert_eq!(
        open::<HeartbeatRecord>(&sealed, elsewhere),
        Err(FormatError::ForeignVolume(PLACE.volume))
    );
    let here = Lba(1);
    assert_eq!(
        open::<HeartbeatRecord>(&sealed, Place { lba: here, ..PLACE }),
        Err(FormatError::Misplaced {
            here,
            found: PLACE.lba
        })
    );
    let (wanted, found) = (3, 2);
    assert_eq!(
        open::<PaxosBlock>(&sealed, PLACE),
        Err(FormatError::Kind { wanted, found })
    );
    assert_eq!(
        open::<PaxosBlock>(&[0; 512], PLACE),
        Err(FormatError::Blank)
    );
    assert_eq!(
        open::<PaxosBlock>(&[1; 511], PLACE),
        Err(FormatError::Short(511))
    );
}

/// A superblock of another release: magic and checksum are valid, the byte at `offset` is not known.
fn superblock_of_version(offset: usize, value: u8) -> [u8; 4096] {
    let (mut store, _) = formatted();
    let mut block = [0; 4096];
    store.read(FIRST_COPY, &mut block).unwrap();
    block[offset] = value;
    block[8..12].fill(0);
    let crc = crc32c::crc32c(&block[..512]);
    block[8..12].copy_from_slice(&crc.to_le_bytes());
    block
}

#[test]
fn a_newer_format_is_distinguished_from_a_damaged_one() {
    let known = 2;
    for offset in [48, 6] {
        let parse = |found| {
            let copy = superblock_of_version(offset, found);
            Superblock::parse_copy(&copy, FIRST_COPY)
        };
        assert_eq!(parse(3), Err(FormatError::Newer { found: 3, known }));
        assert_eq!(parse(1), Err(FormatError::Older { found: 1, known }));
    }
    let (mut store, superblock) = formatted();
    let incompat = superblock_of_version(60, 1);
    store.write(FIRST_COPY, &incompat).unwrap();
    store.write(superblock.last_copy(), &[0; 4096]).unwrap();
    let error = read_superblock(&mut store).unwrap_err();
    assert!(matches!(error, OpenError::Newer(_)), "{error}");
    let older = superblock_of_version(48, 1);
    store.write(FIRST_COPY, &older).unwrap();
    let error = read_superblock(&mut store).unwrap_err();
    assert!(matches!(error, OpenError::Older(_)), "{error}");
}

#[test]
fn a_device_too_small_is_refused_with_what_is_needed() {
    let mut request = request();
    request.device_bytes = 1 << 20;
    let error = request.lay_out().unwrap_err().to_string();
    assert!(error.contains("at least"), "{error}");
    request.device_bytes = 64 << 20;
    request.timings.watch = Duration::from_secs(11);
    let error = request.lay_out().unwrap_err();
    assert!(error.to_string().contains("timing"), "{error}");
}

#[test]
fn the_default_safe_time_is_within_thirty_seconds() {
    assert!(Timings::DEFAULT.validate().is_ok());
    assert!(Timings::DEFAULT.safe_time() <= Duration::from_secs(30));
}

/// The areas of 4 slots in 7 blocks: computing their sizes panicked, and with one block of heartbeats the second slot's
/// heartbeats lay over Paxos blocks.
#[test]
fn a_superblock_whose_regions_have_no_room_for_its_slots_is_refused() {
    let (_, superblock) = formatted();
    let lba = FIRST_COPY;
    let parse = |superblock: &Superblock| {
        Superblock::parse_copy(&seal(superblock, superblock.place(lba)), lba)
    };
    for index in 0..superblock.regions.len() {
        let mut smaller = superblock.clone();
        let region = &mut smaller.regions[index];
        let needed = match region.kind {
            RegionKind::Heartbeats => 4 * 4,
            RegionKind::Paxos => 4 * 8,
            RegionKind::Leaders => 4,
            RegionKind::Areas => 4 * 2 * 64,
            RegionKind::Mailbox => 4 * 16,
            RegionKind::References | RegionKind::Extents => 1,
        };
        region.blocks = needed;
        assert_eq!(parse(&smaller).as_ref(), Ok(&smaller));
        smaller.regions[index].blocks = needed - 1;
        assert_eq!(parse(&smaller), Err(FormatError::Field("regions")));
    }
}

/// Seals any body with a valid envelope, so that it reaches the parser behind the checksum.
fn hostile<R: Record>(body: &[u8]) -> [u8; 512] {
    let mut bytes = seal(&heartbeat(), PLACE);
    bytes[4..6].copy_from_slice(&R::KIND.code().to_le_bytes());
    let room = &mut bytes[48..];
    let length = body.len().min(room.len());
    room[..length].copy_from_slice(&body[..length]);
    bytes[8..12].fill(0);
    let crc = crc32c::crc32c(&bytes);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Parses a hostile body; what it accepts must read back as itself.
fn survives<R: Record + PartialEq + std::fmt::Debug>(body: &[u8]) {
    if let Ok(record) = open::<R>(&hostile::<R>(body), PLACE) {
        round_trip(&record);
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(body in proptest::collection::vec(any::<u8>(), 0..464)) {
        survives::<HeartbeatRecord>(&body);
        survives::<PaxosBlock>(&body);
        survives::<LeaderBlock>(&body);
        survives::<CheckpointHead>(&body);
        survives::<CheckpointRow>(&body);
        survives::<JournalBlock>(&body);
        drop(Superblock::parse_copy(&hostile::<Superblock>(&body), PLACE.lba));
        prop_assert!(open::<JournalBlock>(&body, PLACE).is_err(), "no envelope");
    }

    #[test]
    fn a_damaged_record_never_panics(at in 66_usize..512, byte: u8, which in 0_usize..12) {
        let record = every_record().swap_remove(which);
        let journal = JournalBlock { id: CHECKPOINT, sequence: 0, position: 0, more: false, record };
        let mut bytes = seal(&journal, PLACE);
        bytes[at] = byte;
        survives::<JournalBlock>(&bytes[48..]);
        survives::<CheckpointRow>(&bytes[48..]);
    }

    #[test]
    fn heartbeats_read_back(
        slot: u16,
        generation: u64,
        sequence in 1..u64::MAX,
        detached: bool,
        address in "[a-z0-9:.]{0,64}",
    ) {
        let record = HeartbeatRecord {
            owner: owner(slot, generation),
            sequence,
            detached,
            address,
            ..heartbeat()
        };
        round_trip(&record);
    }

    #[test]
    fn paxos_and_leader_blocks_read_back(
        instance: u64,
        slot: u16,
        generation in 1..u64::MAX,
        mbal: u64,
        bal in 1_u64..,
        accepted: bool,
    ) {
        let value = owner(slot, generation);
        let bal = bal.min(mbal);
        let accepted = (accepted && bal > 0).then_some(Accepted { bal, value });
        let instance = CoordinatorEpoch(instance);
        round_trip(&PaxosBlock { instance, writer: value, mbal, accepted });
        round_trip(&LeaderBlock { epoch: instance, coordinator: value });
    }

    #[test]
    fn every_layout_keeps_its_regions_apart(
        slot_count in 1_u16..=64,
        extent_mib in 1_u32..=8,
        device_mib in 256_u64..1 << 22,
    ) {
        let mut request = request();
        request.slot_count = slot_count;
        request.extent_mib = extent_mib;
        request.device_bytes = device_mib << 20;
        request.cluster = ClusterId::from_bytes([1; 16]);
        let superblock = request.lay_out().unwrap();
        let place = superblock.place(superblock.last_copy());
        let bytes = seal(&superblock, place);
        let parsed = Superblock::parse_copy(&bytes, place.lba).unwrap();
        prop_assert_eq!(&parsed, &superblock);
        let extents = superblock.region(RegionKind::Extents);
        let first = superblock.region(RegionKind::Heartbeats).start;
        prop_assert!(first.0 >= 256 && extents.start.0 + extents.blocks <= superblock.blocks - 256);
        prop_assert_eq!(superblock.blocks, device_mib * 256);
    }
}
