//! The gate page from the point of view of its writer and readers.
#![expect(clippy::unwrap_used, reason = "fixtures of tests")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bascule_types::{BootTime, Generation, Owner, SlotId, VolumeId};
use bascule_volume_gate::{
    GateClosedReason, GateError, GateReader, GateTakenOver, GateWriter, boot_time_now,
};

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

fn owner(generation: u64) -> Owner {
    Owner {
        slot: SlotId(3),
        generation: Generation(generation),
    }
}

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gate");
        Self { _dir: dir, path }
    }

    fn writer(&self) -> GateWriter {
        GateWriter::open(&self.path, VOLUME).unwrap().0
    }

    fn reader(&self) -> GateReader {
        GateReader::open(&self.path).unwrap()
    }
}

fn reason(reader: &GateReader, now: u64, owner: Owner) -> GateClosedReason {
    reader.check(BootTime(now), owner).unwrap_err().reason
}

#[test]
fn a_fresh_gate_is_closed_and_opens_for_the_published_owner_until_its_expiry() {
    let fixture = Fixture::new();
    let (writer, found) = GateWriter::open(&fixture.path, VOLUME).unwrap();
    assert_eq!(found, GateTakenOver::Fresh);
    let reader = fixture.reader();
    let no_lease = GateClosedReason::OtherOwner { shown: None };
    assert_eq!(reason(&reader, 1, owner(1)), no_lease);

    writer.publish(owner(1), BootTime(100)).unwrap();
    assert_eq!(reader.check(BootTime(99), owner(1)), Ok(()));
    let expired = GateClosedReason::Expired {
        expiry: BootTime(100),
    };
    assert_eq!(reason(&reader, 100, owner(1)), expired);
    assert_eq!(reader.volume(), VOLUME);
}

#[test]
fn a_renewal_opens_the_gate_again() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    let reader = fixture.reader();
    writer.publish(owner(1), BootTime(100)).unwrap();
    assert!(reader.check(BootTime(100), owner(1)).is_err());
    writer.publish(owner(1), BootTime(200)).unwrap();
    assert_eq!(reader.check(BootTime(100), owner(1)), Ok(()));
}

#[test]
fn a_newer_generation_closes_the_gate_for_the_older_one_permanently() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    let reader = fixture.reader();
    writer.publish(owner(1), BootTime(100)).unwrap();
    writer.publish(owner(2), BootTime(200)).unwrap();
    let other = GateClosedReason::OtherOwner {
        shown: Some(owner(2)),
    };
    assert_eq!(reason(&reader, 50, owner(1)), other);
    assert_eq!(reader.check(BootTime(50), owner(2)), Ok(()));
    let refused = writer.publish(owner(1), BootTime(300)).unwrap_err();
    assert!(matches!(refused, GateError::NotNewer { .. }), "{refused}");
    assert_eq!(reader.check(BootTime(50), owner(2)), Ok(()), "unchanged");
}

#[test]
fn a_page_serves_one_slot_only() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    writer.publish(owner(1), BootTime(100)).unwrap();
    let elsewhere = Owner {
        slot: SlotId(4),
        generation: Generation(9),
    };
    let refused = writer.publish(elsewhere, BootTime(100)).unwrap_err();
    assert!(matches!(refused, GateError::NotNewer { .. }), "{refused}");
}

#[test]
fn the_gate_of_a_failed_volume_stays_closed_through_renewals_until_the_volume_is_verified() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    let reader = fixture.reader();
    writer.publish(owner(1), BootTime(100)).unwrap();
    writer.mark_failed();
    writer.publish(owner(1), BootTime(200)).unwrap();
    assert_eq!(
        reason(&reader, 50, owner(1)),
        GateClosedReason::StickyFailed
    );
    assert!(reader.view().failed);
    writer.clear_failed();
    assert_eq!(reader.check(BootTime(50), owner(1)), Ok(()));
}

#[test]
fn i4_a_restarted_writer_finds_its_lease_and_closes_no_gate() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    let reader = fixture.reader();
    writer.publish(owner(5), BootTime(100)).unwrap();
    writer.record_sequence_sent(41);
    writer.record_sequence_sent(40);
    drop(writer);
    assert_eq!(reader.check(BootTime(99), owner(5)), Ok(()));

    let (_again, found) = GateWriter::open(&fixture.path, VOLUME).unwrap();
    let GateTakenOver::Existing(view) = found else {
        panic!("the lease was lost: {found:?}");
    };
    assert_eq!(view.owner, Some(owner(5)));
    assert_eq!(view.expiry, BootTime(100));
    assert_eq!(view.sequence_sent, 41);
    assert!(view.lease_is_valid(BootTime(99)) && !view.lease_is_valid(BootTime(100)));
    assert_eq!(reader.check(BootTime(99), owner(5)), Ok(()));
}

#[test]
fn a_second_writer_is_refused_while_the_first_holds_the_lock() {
    let fixture = Fixture::new();
    let first = fixture.writer();
    let refused = GateWriter::open(&fixture.path, VOLUME).unwrap_err();
    assert!(matches!(refused, GateError::Busy { .. }), "{refused}");
    drop(first);
    assert!(GateWriter::open(&fixture.path, VOLUME).is_ok());
}

#[test]
fn a_page_of_another_volume_is_refused() {
    let fixture = Fixture::new();
    drop(fixture.writer());
    let other = VolumeId::from_bytes([8; 16]);
    let refused = GateWriter::open(&fixture.path, other).unwrap_err();
    assert!(
        matches!(refused, GateError::OtherVolume { .. }),
        "{refused}"
    );
}

#[test]
fn a_page_of_an_earlier_boot_is_refused_to_readers_and_reinitialised_by_the_writer() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    writer.publish(owner(5), BootTime(u64::MAX)).unwrap();
    drop(writer);
    let mut bytes = std::fs::read(&fixture.path).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&fixture.path, &bytes).unwrap();
    let refused = GateReader::open(&fixture.path).unwrap_err();
    assert!(matches!(refused, GateError::EarlierBoot), "{refused}");
    let (_writer, found) = GateWriter::open(&fixture.path, VOLUME).unwrap();
    assert_eq!(found, GateTakenOver::Fresh);
    assert!(fixture.reader().check(BootTime(1), owner(5)).is_err());
}

#[test]
fn a_newer_layout_another_file_type_and_an_unfinished_page_are_refused_with_distinct_errors() {
    let fixture = Fixture::new();
    std::fs::write(&fixture.path, b"short").unwrap();
    let refused = GateReader::open(&fixture.path).unwrap_err();
    assert!(matches!(refused, GateError::NotReady), "{refused}");

    let mut bytes = vec![0; 5000];
    std::fs::write(&fixture.path, &bytes).unwrap();
    let refused = GateReader::open(&fixture.path).unwrap_err();
    assert!(matches!(refused, GateError::NotReady), "{refused}");

    bytes[..8].copy_from_slice(b"ELEPHANT");
    std::fs::write(&fixture.path, &bytes).unwrap();
    let refused = GateWriter::open(&fixture.path, VOLUME).unwrap_err();
    assert!(matches!(refused, GateError::BadMagic), "{refused}");
    assert_eq!(std::fs::read(&fixture.path).unwrap(), bytes, "left alone");

    bytes[..8].copy_from_slice(b"BSCLGATE");
    bytes[16] = 2;
    std::fs::write(&fixture.path, &bytes).unwrap();
    let refused = GateReader::open(&fixture.path).unwrap_err();
    assert!(
        matches!(
            refused,
            GateError::TooNew {
                needed: 2,
                known: 1
            }
        ),
        "{refused}"
    );
}

#[test]
fn the_first_version_of_the_page_has_these_bytes() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    writer.publish(owner(0x0102), BootTime(0x0304)).unwrap();
    writer.record_sequence_sent(0x0506);
    let bytes = std::fs::read(&fixture.path).unwrap();
    assert_eq!(bytes.len(), 4096);
    assert_eq!(&bytes[..8], b"BSCLGATE");
    assert_eq!(
        &bytes[8..24],
        &[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(&bytes[24..40], &[7; 16]);
    assert_eq!(&bytes[64..72], &[3, 0, 2, 1, 0, 0, 0, 0]);
    assert_eq!(&bytes[72..80], &[4, 3, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[80..88], &[0; 8]);
    assert_eq!(&bytes[88..96], &[6, 5, 0, 0, 0, 0, 0, 0]);
    assert!(bytes[96..].iter().all(|&b| b == 0));
}

#[test]
fn a_descriptor_for_readers_cannot_write_the_page() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    writer.publish(owner(1), BootTime(100)).unwrap();
    let fd = writer.reader_fd().unwrap();
    assert_eq!(rustix::io::write(&fd, b"x"), Err(rustix::io::Errno::BADF));
    let reader = GateReader::from_fd(fd).unwrap();
    assert_eq!(reader.check(BootTime(99), owner(1)), Ok(()));
}

#[test]
fn a_generation_of_more_than_48_bits_is_refused() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    let refused = writer.publish(owner(1 << 48), BootTime(1)).unwrap_err();
    assert!(
        matches!(refused, GateError::GenerationTooLarge { .. }),
        "{refused}"
    );
}

/// Every generation g is published with expiry g. A check of generation g that passes at g or later
/// has therefore combined two publications.
#[test]
fn i1_no_reader_combines_one_generations_owner_with_anothers_expiry() {
    let fixture = Fixture::new();
    let writer = fixture.writer();
    let reader = Arc::new(fixture.reader());
    let done = Arc::new(AtomicBool::new(false));
    let checker = {
        let (reader, done) = (Arc::clone(&reader), Arc::clone(&done));
        std::thread::Builder::new()
            .name("checker".into())
            .spawn(move || {
                let mut passed = 0_u64;
                while !done.load(Ordering::SeqCst) {
                    let Some(shown) = reader.view().owner else {
                        continue;
                    };
                    let at = BootTime(shown.generation.0);
                    assert!(reader.check(at, shown).is_err(), "{shown} passed at {at:?}");
                    passed += u64::from(reader.check(BootTime(at.0 - 1), shown).is_ok());
                }
                passed
            })
            .unwrap()
    };
    let until = boot_time_now().after(std::time::Duration::from_millis(200));
    let mut generation = 1;
    while boot_time_now() < until {
        writer
            .publish(owner(generation), BootTime(generation))
            .unwrap();
        generation += 1;
    }
    done.store(true, Ordering::SeqCst);
    let passed = checker.join().unwrap();
    assert!(generation > 1000 && passed > 0, "{generation} {passed}");
}
