use std::fs::File;

use bascule_types::{Bytes, ClusterId};
use bascule_volume_format::{
    BLOCK_BYTES, Fencing, FencingPolicy, FormatRequest, MemStore, Timings, make_volume,
};
use bascule_volume_gate::boot_time_now;

use super::*;
use crate::block_device::{Access, Device};
use crate::writer_lock::start_time;

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const BOOT: [u8; 16] = [7; 16];
const LATER_BOOT: [u8; 16] = [8; 16];
const SLOT: SlotId = SlotId(1);

/// A ledger's directory, and a device whose lock the processes hold.
struct Fixture {
    directory: tempfile::TempDir,
    store: MemStore,
    superblock: Superblock,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        File::create(directory.path().join("device")).unwrap();
        let request = FormatRequest {
            volume: VOLUME,
            cluster: ClusterId::from_bytes([2; 16]),
            fencing: Fencing::Watchdog,
            policy: FencingPolicy::default(),
            timings: Timings::DEFAULT,
            slot_count: 2,
            extent_mib: 1,
            device_bytes: Bytes::mib(64).0,
        };
        let mut store = MemStore::new(Bytes::mib(64).0 / BLOCK_BYTES as u64);
        let superblock = make_volume(&mut store, &request, None).unwrap();
        Self {
            directory,
            store,
            superblock,
        }
    }

    fn device(&self) -> Device {
        Device::open(&self.directory.path().join("device"), Access::ReadWrite).unwrap()
    }

    fn open(&self, boot: [u8; 16], device: &Device) -> io::Result<WriteLedger> {
        let process = std::process::id();
        WriteLedger::open(LedgerParts {
            rules: Rules::ENFORCED,
            directory: self.directory.path(),
            volume: VOLUME,
            boot,
            now: boot_time_now(),
            process: (process, start_time(process).unwrap()),
            device: Box::new(device.clone()),
        })
    }

    /// The next process: it opens the device anew.
    fn next(&self, boot: [u8; 16]) -> WriteLedger {
        self.open(boot, &self.device()).unwrap()
    }

    fn process(&self) -> RecordedStore<MemStore> {
        let ledger = self.next(BOOT);
        RecordedStore::new(self.store.clone(), self.superblock.clone(), ledger)
    }

    /// The leader block of [`SLOT`].
    fn leader(&self) -> Lba {
        self.superblock.leader_lba(SLOT)
    }
}

const BLOCK: [u8; BLOCK_BYTES] = [3; BLOCK_BYTES];

/// Regression: the next process knew nothing of it, and wrote the same block again.
#[test]
fn i2_a_failed_write_is_known_to_every_later_process_until_the_node_reboots() {
    let fixture = Fixture::new();
    for failing_flush in [false, true] {
        let mut process = fixture.process();
        process.store.fail_once(u64::from(failing_flush));
        let done = process.write(fixture.leader(), &BLOCK);
        assert_eq!(done.is_ok(), failing_flush);
        if failing_flush {
            process.flush().unwrap_err();
        }
        drop(process);
        for _ in 0..2 {
            let next = fixture.next(BOOT);
            assert_eq!(next.barred(SLOT), BTreeSet::from([SlotPart::Leader]));
            assert_eq!(next.barred(SlotId(0)), BTreeSet::new());
            assert_eq!(next.quiet_since(), BootTime(0));
        }
        assert_eq!(fixture.next(LATER_BOOT).barred(SLOT), BTreeSet::new());
    }
}

#[test]
fn a_part_is_recorded_before_its_write_begins_and_until_it_is_flushed() {
    let fixture = Fixture::new();
    let mut process = fixture.process();
    let area = fixture.superblock.area(bascule_volume_format::AreaId {
        slot: SLOT,
        half: 1,
    });
    process.write(area.journal, &BLOCK).unwrap();
    let recorded = process.ledger.read().unwrap().unwrap();
    assert_eq!(
        recorded.submitted,
        BTreeSet::from([(SLOT, SlotPart::Area(1))])
    );
    process.flush().unwrap();
    let recorded = process.ledger.read().unwrap().unwrap();
    assert_eq!(recorded.submitted, BTreeSet::new());
    // Heartbeats have rules of their own.
    let heartbeat = fixture.superblock.heartbeat_lba(SLOT, 0);
    process.store.fail_once(0);
    process.write(heartbeat, &BLOCK).unwrap_err();
    drop(process);
    assert_eq!(fixture.next(BOOT).barred(SLOT), BTreeSet::new());
}

#[test]
fn the_next_process_waits_for_a_write_that_a_killed_one_had_submitted() {
    let fixture = Fixture::new();
    let (device, before) = (fixture.device(), boot_time_now());
    let ledger = fixture.open(BOOT, &device).unwrap();
    let mut process = RecordedStore::new(fixture.store.clone(), fixture.superblock.clone(), ledger);
    process.write(fixture.leader(), &BLOCK).unwrap();
    drop(process);
    // As long as its device is in use, by a descriptor or a request, its write may be in flight.
    let refused = fixture.open(BOOT, &fixture.device()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::WouldBlock, "{refused}");
    drop(device);
    let mut next = fixture.next(BOOT);
    assert!(next.quiet_since() >= before, "it waits for the settle time");
    assert_eq!(next.barred(SLOT), BTreeSet::new());
    next.settle().unwrap();
    drop(next);
    assert_eq!(fixture.next(BOOT).quiet_since(), BootTime(0));
}

#[test]
fn a_write_on_a_device_that_is_gone_counts_as_failed() {
    let fixture = Fixture::new();
    let mut process = fixture.process();
    process.write(fixture.leader(), &BLOCK).unwrap();
    drop(process);
    // The first one stays, so that the other gets another inode.
    let path = fixture.directory.path().join("device");
    fs::rename(&path, path.with_extension("away")).unwrap();
    File::create(&path).unwrap();
    let next = fixture.next(BOOT);
    assert_eq!(next.barred(SLOT), BTreeSet::from([SlotPart::Leader]));
}

#[test]
fn an_error_before_the_submission_leaves_nothing_to_reckon_with() {
    for errno in [
        Errno::FBIG,
        Errno::INVAL,
        Errno::BADF,
        Errno::FAULT,
        Errno::NXIO,
    ] {
        assert!(submitted_nothing(&errno.into()), "{errno}");
    }
    for errno in [Errno::IO, Errno::TIMEDOUT, Errno::NOLINK, Errno::NOSPC] {
        assert!(!submitted_nothing(&errno.into()), "{errno}");
    }
    assert!(!submitted_nothing(&io::Error::other("short write")));
}

#[test]
fn a_file_that_is_something_else_is_refused_and_one_that_a_reset_cut_off_is_not() {
    let fixture = Fixture::new();
    let path = fixture.next(BOOT).path;
    fs::write(&path, "no ledger").unwrap();
    let refused = fixture.open(BOOT, &fixture.device()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    fs::write(&path, "").unwrap();
    assert_eq!(fixture.next(BOOT).barred(SLOT), BTreeSet::new());
}
