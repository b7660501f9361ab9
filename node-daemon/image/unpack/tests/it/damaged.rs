//! qcow2 images with every header field at its limits, and with any byte changed.

use std::fs;

use bascule_image_unpack::{DiskError, Piece, Qcow2Disk};
use proptest::prelude::*;

use crate::tools::{Workshop, assert_same, disk, read_disk};

/// The header's fields: name, offset and length in bytes (QEMU, docs/interop/qcow2.rst).
const FIELDS: &[(&str, usize, usize)] = &[
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
    ("the first extension's type", 112, 4),
    ("the first extension's length", 116, 4),
];

/// Every power of two, the neighbours of those that are the limit of a number of bytes, and everything set.
fn limits(bits: usize) -> impl Iterator<Item = u64> {
    let powers = (0..bits).map(|bit| 1_u64 << bit);
    let bytes = (0..bits).step_by(8).flat_map(|bit| {
        let power = 1_u64 << bit;
        [power - 1, power + 1, (power << 7) - 1, (power << 7) + 1]
    });
    let all = u64::MAX >> (64 - bits);
    powers.chain(bytes).chain([all - 1, all])
}

#[test]
fn a_header_field_at_any_limit_is_an_error_or_read_as_qemu_reads_it() {
    let test = "a_header_field_at_any_limit_is_an_error_or_read_as_qemu_reads_it";
    let Some(workshop) = Workshop::or_skip(test, &["qemu-img"]) else {
        return;
    };
    let disk = disk(1 << 18);
    workshop.write("disk", &disk);
    let (mut refused, mut same, mut compared) = (0, 0, 0);
    for options in ["compat=0.10", "compat=1.1,cluster_size=4k"] {
        workshop.must(&format!(
            "qemu-img convert -f raw -O qcow2 -o {options} disk good"
        ));
        let good = fs::read(workshop.path("good")).unwrap();
        for &(name, at, length) in FIELDS {
            for value in limits(length * 8) {
                let mut image = good.clone();
                image[at..at + length].copy_from_slice(&value.to_be_bytes()[8 - length..]);
                let path = workshop.write("image", &image);
                let Ok(read) = read_disk(&path, 1 << 20) else {
                    refused += 1;
                    continue;
                };
                if read == disk {
                    same += 1;
                } else if let Some(wanted) = workshop.qemu_reads("image") {
                    let what = format!("{options}: {name} = {value}");
                    // QEMU leaves a part of a sector out.
                    assert_eq!(wanted.len(), read.len() / 512 * 512, "{what}");
                    assert_same(&read[..wanted.len()], &wanted, &what);
                    compared += 1;
                }
            }
        }
    }
    let counts = format!("{refused} {same} {compared}");
    assert!(refused > 500 && same > 300 && compared > 10, "{counts}");
}

#[test]
fn a_truncated_image_is_an_error() {
    let test = "a_truncated_image_is_an_error";
    let Some(workshop) = Workshop::or_skip(test, &["qemu-img"]) else {
        return;
    };
    workshop.write("disk", &disk(1 << 19));
    for kind in ["", " -c"] {
        workshop.must(&format!("qemu-img convert -f raw -O qcow2{kind} disk good"));
        let good = fs::read(workshop.path("good")).unwrap();
        // QEMU does not fill the last cluster either.
        let last = good.len() - (64 << 10);
        for length in (0..last).step_by(4001) {
            let path = workshop.write("image", &good[..length]);
            let cut = read_disk(&path, 1 << 20);
            assert!(cut.is_err(), "{length} of {}", good.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Not even the library's own errors may end the process, and no image is longer than it says.
    #[test]
    fn no_bytes_crash_the_reader(
        changes in proptest::collection::vec((0..200_000usize, any::<u8>()), 1..20),
        tables in proptest::collection::vec((0..6usize, 0..600usize, any::<u64>()), 0..20),
        compressed in any::<bool>(),
    ) {
        let Some(workshop) = Workshop::or_skip("no_bytes_crash_the_reader", &["qemu-img"]) else {
            return Ok(());
        };
        workshop.write("disk", &disk(1 << 18));
        let kind = if compressed { " -c" } else { "" };
        workshop.must(&format!(
            "qemu-img convert -f raw -O qcow2{kind} -o cluster_size=4k disk image"
        ));
        let path = workshop.path("image");
        let mut image = fs::read(&path).unwrap();
        for (at, byte) in changes {
            if let Some(there) = image.get_mut(at) {
                *there = byte;
            }
        }
        // The entries of tables are in the first clusters.
        for (cluster, entry, value) in tables {
            let at = cluster * 4096 + entry * 8 % 4096;
            image[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        fs::write(&path, image).unwrap();
        prop_assert!(is_bounded(&path));
    }
}

/// Reads at most 16 MiB of the image.
fn is_bounded(image: &std::path::Path) -> bool {
    let mut disk = match Qcow2Disk::open(fs::File::open(image).unwrap()) {
        Ok(disk) => disk,
        Err(DiskError::Io(_)) => return false,
        Err(_) => return true,
    };
    let (mut buffer, mut length) = (vec![0; 1 << 20], 0);
    for _ in 0..16 {
        match disk.next_piece(&mut buffer) {
            Ok(Some(Piece::Data(count))) => length += count as u64,
            Ok(Some(Piece::Zeroes(count))) => length += count,
            Ok(None) => return length == disk.size(),
            Err(_) => return true,
        }
    }
    length <= disk.size()
}
