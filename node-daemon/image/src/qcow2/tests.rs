//! Headers as `qemu-img create` writes them, each with one field changed.

use super::*;

/// Version 3, clusters of 64 KiB, a disk of 1 GiB, in a file of 4 clusters.
fn header() -> Vec<u8> {
    let mut header = vec![0; QCOW2_HEADER_BYTES];
    header[..4].copy_from_slice(b"QFI\xfb");
    for (at, value) in [(4, 3), (20, 16), (36, 2), (56, 1), (96, 4), (100, 112)] {
        put(&mut header, at, &u32::to_be_bytes(value));
    }
    for (at, value) in [(24, 1 << 30), (40, 3 << 16), (48, 1 << 16)] {
        put(&mut header, at, &u64::to_be_bytes(value));
    }
    header
}

fn put(header: &mut [u8], at: usize, bytes: &[u8]) {
    header[at..at + bytes.len()].copy_from_slice(bytes);
}

fn with(at: usize, bytes: &[u8]) -> Result<Qcow2Header, Qcow2Fault> {
    let mut header = header();
    put(&mut header, at, bytes);
    Qcow2Header::parse(&header)
}

#[test]
fn a_header_of_either_version_is_read() {
    let read = Qcow2Header {
        virtual_size: 1 << 30,
        cluster_bits: 16,
        l1_entries: 2,
        l1_offset: 3 << 16,
    };
    assert_eq!(Qcow2Header::parse(&header()), Ok(read));
    // In version 2 the bytes behind the header are the backing file's name or nothing.
    let mut old = header();
    put(&mut old, 4, &2_u32.to_be_bytes());
    put(&mut old, 72, &[0xff; 32]);
    assert_eq!(Qcow2Header::parse(&old), Ok(read));
    assert_eq!(Qcow2Header::parse(&old[..72]), Ok(read));
    assert_eq!(Qcow2Header::parse(&header()[..104]), Ok(read));
}

#[test]
fn every_truncated_header_is_refused() {
    for length in 0..104 {
        let short = Qcow2Header::parse(&header()[..length]);
        assert!(
            matches!(short, Err(Qcow2Fault::NoHeader { found, .. }) if found == length),
            "{length}: {short:?}"
        );
    }
}

#[test]
fn an_image_that_needs_another_file_is_refused() {
    assert_eq!(with(15, &[1]), Err(Qcow2Fault::BackingFile));
    assert_eq!(with(8, &[0x80]), Err(Qcow2Fault::BackingFile));
    assert_eq!(with(79, &[0b100]), Err(Qcow2Fault::ExternalDataFile));
    // Whatever else is wrong with it.
    assert_eq!(with(79, &[0b111]), Err(Qcow2Fault::ExternalDataFile));
}

#[test]
fn every_feature_that_is_not_read_is_named() {
    for (bit, fault) in [
        (0, Qcow2Fault::Dirty),
        (1, Qcow2Fault::Corrupt),
        (3, Qcow2Fault::CompressionType),
        (4, Qcow2Fault::ExtendedL2),
        (5, Qcow2Fault::UnknownFeatures(1 << 5)),
        (63, Qcow2Fault::UnknownFeatures(1 << 63)),
    ] {
        assert_eq!(with(72, &(1_u64 << bit).to_be_bytes()), Err(fault));
    }
    assert_eq!(with(104, &[1]), Err(Qcow2Fault::CompressionType));
    for method in [1, 2, 7] {
        assert_eq!(
            with(35, &[method]),
            Err(Qcow2Fault::Encrypted(method.into()))
        );
    }
    for version in [0, 1, 4, u32::MAX] {
        let refused = Err(Qcow2Fault::Version(version));
        assert_eq!(with(4, &version.to_be_bytes()), refused);
    }
}

#[test]
fn features_that_a_reader_may_ignore_are_ignored() {
    for at in [80, 88] {
        with(at, &u64::MAX.to_be_bytes()).unwrap();
    }
    // Snapshots, and where the refcounts end.
    with(56, &[0xff; 16]).unwrap();
}

#[test]
fn a_field_without_sense_is_named_with_its_value() {
    for (name, at, value) in [
        ("cluster_bits", 20, 8),
        ("cluster_bits", 20, 22),
        ("cluster_bits", 20, u32::MAX),
        ("refcount_order", 96, 7),
        ("refcount_order", 96, u32::MAX),
        ("header_length", 100, 0),
        ("header_length", 100, 103),
        ("header_length", 100, 105),
        ("header_length", 100, (1 << 16) + 8),
        ("header_length", 100, u32::MAX),
        ("l1_size", 36, (4 << 20) + 1),
        ("l1_size", 36, u32::MAX),
    ] {
        let text = with(at, &value.to_be_bytes()).unwrap_err().to_string();
        assert!(
            text.contains(&format!("field {name} = {value}, which is")),
            "{text}"
        );
    }
    for (name, at) in [("l1_table_offset", 40), ("refcount_table_offset", 48)] {
        for value in [1, 512, u64::MAX, 1 << 60] {
            let text = with(at, &u64::to_be_bytes(value)).unwrap_err().to_string();
            assert!(text.contains(&format!("field {name} = {value}")), "{text}");
        }
    }
}

#[test]
fn an_image_larger_than_its_disk_is_refused_with_both_numbers() {
    let header = Qcow2Header::parse(&header()).unwrap();
    assert_eq!(header.check_size(1 << 30), Ok(()));
    let text = header.check_size((1 << 30) - 512).unwrap_err().to_string();
    assert!(
        text.contains("1073741824") && text.contains("1073741312"),
        "{text}"
    );
}

#[test]
fn the_l1_table_covers_the_disk() {
    // 512 MiB for each entry.
    assert!(with(36, &3_u32.to_be_bytes()).is_ok());
    let short = with(36, &1_u32.to_be_bytes());
    assert_eq!(
        short,
        Err(Qcow2Fault::L1TooSmall {
            needed: 2,
            found: 1
        })
    );
    let huge = with(24, &u64::MAX.to_be_bytes());
    assert!(
        matches!(huge, Err(Qcow2Fault::L1TooSmall { .. })),
        "{huge:?}"
    );
}

#[test]
fn a_table_behind_the_files_end_is_no_table_of_zeroes() {
    let header = Qcow2Header::parse(&header()).unwrap();
    let file = (3 << 16) + 16;
    assert_eq!(header.check_file(file), Ok(()));
    assert!(header.check_file(file - 1).is_err());
    let l1 = |entry: u64| [0_u64.to_be_bytes(), entry.to_be_bytes()].concat();
    let used = 1 << 63;
    let file = (5 << 16) - 1;
    for entry in [0, used | 3 << 16] {
        assert_eq!(header.check_l1(&l1(entry), file), Ok(()));
    }
    for offset in [4 << 16, 1 << 55] {
        let refused = Err(outside("L2 table", offset, file));
        assert_eq!(header.check_l1(&l1(used | offset), file), refused);
    }
    let unaligned = header.check_l1(&l1(used | 512), file);
    assert_eq!(unaligned, Err(Qcow2Fault::L1Entry(1)));
}
