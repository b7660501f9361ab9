//! What is written is read, wherever it lies, and nothing passes a closed gate.

use std::io::{Seek, SeekFrom};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use bascule_types::Lba;

use super::*;

#[derive(Debug, Default)]
struct TestGate {
    closed: AtomicBool,
    checks: AtomicU32,
}

impl WriteGate for TestGate {
    fn is_open(&self) -> bool {
        self.checks.fetch_add(1, Ordering::Relaxed);
        !self.closed.load(Ordering::Relaxed)
    }
}

/// Three extents of 1 MiB, the last two out of order.
fn area(file: &File, gate: Option<Arc<dyn WriteGate>>) -> SavedArea {
    let run = |mib: u64| ExtentRun {
        start: Lba(mib * 256),
        length: Bytes::mib(1),
    };
    SavedArea {
        device: Arc::new(file.try_clone().unwrap()),
        extents: vec![run(1), run(5), run(3)],
        gate,
    }
}

fn written(file: &File, bytes: &[u8]) -> io::Result<SavedStateSum> {
    let mut writer = ImageWriter::new(area(file, Some(Arc::<TestGate>::default())))?;
    for piece in bytes.chunks(1000) {
        writer.write_all(piece)?;
    }
    writer.finish()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

#[test]
fn an_image_reads_back_across_scattered_extents() {
    let file = tempfile::tempfile().unwrap();
    for length in [1, 4096, (1 << 20) + 1, 3 << 20] {
        let bytes = pattern(length);
        let sum = written(&file, &bytes).unwrap();
        assert_eq!(sum.length, Bytes(length as u64));
        assert_eq!(sum.crc32c, crc32c::crc32c(&bytes));
        let mut reader = ImageReader::new(area(&file, None), sum.length);
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        assert!(back == bytes, "{length} bytes");
        assert_eq!(reader.checksum(), (sum.crc32c, true));
    }
}

#[test]
fn an_image_beyond_its_area_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let error = written(&file, &pattern((3 << 20) + 1)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn a_changed_byte_changes_the_checksum() {
    let mut file = tempfile::tempfile().unwrap();
    let sum = written(&file, &pattern(2 << 20)).unwrap();
    file.seek(SeekFrom::Start((5 << 20) + 77)).unwrap();
    file.write_all(&[0xff]).unwrap();
    let mut reader = ImageReader::new(area(&file, None), sum.length);
    io::copy(&mut reader, &mut io::sink()).unwrap();
    assert_ne!(reader.checksum().0, sum.crc32c);
}

#[test]
fn i1_every_write_of_an_image_passes_the_gate() {
    let file = tempfile::tempfile().unwrap();
    let gate = Arc::new(TestGate::default());
    let mut writer = ImageWriter::new(area(&file, Some(gate.clone()))).unwrap();
    writer.write_all(&pattern(3 << 20)).unwrap();
    writer.finish().unwrap();
    assert_eq!(gate.checks.load(Ordering::Relaxed), 3);
    assert!(ImageWriter::new(area(&file, None)).is_err());
}

#[test]
fn a_closed_gate_is_waited_for() {
    let file = tempfile::tempfile().unwrap();
    let gate = Arc::new(TestGate::default());
    gate.closed.store(true, Ordering::Relaxed);
    let opener = {
        let gate = gate.clone();
        std::thread::Builder::new()
            .name("opener".to_owned())
            .spawn(move || {
                while gate.checks.load(Ordering::Relaxed) < 3 {
                    std::thread::yield_now();
                }
                gate.closed.store(false, Ordering::Relaxed);
            })
            .unwrap()
    };
    let mut writer = ImageWriter::new(area(&file, Some(gate))).unwrap();
    writer.write_all(b"late").unwrap();
    assert_eq!(writer.finish().unwrap().length, Bytes(4));
    opener.join().unwrap();
}
