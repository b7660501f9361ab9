//! Files of the compressors' own programs.

use std::io::{self, BufReader, Read};

use bascule_image::Compression;
use bascule_image_unpack::Decompressor;

use crate::tools::{Workshop, assert_same, disk, filter};

pub(crate) fn unpack(compression: Compression, file: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Decompressor::new(compression, file).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A source that gives one byte, then seven, and so on.
struct Drops<'a>(&'a [u8], usize);

impl Read for Drops<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.1 = (self.1 + 6) % 4099;
        let room = into.len().min(self.1 + 1);
        self.0.read(&mut into[..room])
    }
}

#[test]
fn what_the_compressors_write_is_read_whole() {
    let programs = ["gzip", "xz", "zstd"];
    let test = "what_the_compressors_write_is_read_whole";
    if Workshop::or_skip(test, &programs).is_none() {
        return;
    }
    let disk = disk(3 << 20);
    for (compression, words) in [
        (Compression::Gzip, "gzip -1"),
        (Compression::Gzip, "gzip -9"),
        (Compression::Xz, "xz -0"),
        (Compression::Xz, "xz -9"),
        (Compression::Xz, "xz -1 --check=none"),
        (Compression::Xz, "xz -1 --check=crc32"),
        (Compression::Xz, "xz -1 --check=sha256"),
        (Compression::Xz, "xz -1 --block-size=100000"),
        (Compression::Xz, "xz --x86 --delta=dist=4 --lzma2=preset=1"),
        (Compression::Zstd, "zstd -q -1"),
        (Compression::Zstd, "zstd -q -19"),
        (Compression::Zstd, "zstd -q -1 --long=27"),
        (Compression::Zstd, "zstd -q -1 --no-check"),
        (Compression::Zstd, "zstd -q --fast=5 -T2"),
    ] {
        let file = filter(&format!("{words} -c"), &disk);
        assert_same(&unpack(compression, &file).unwrap(), &disk, words);
        // Appended to another, as cat does; an empty one is a file too.
        let empty = filter(&format!("{words} -c"), b"");
        let twice = [&file[..], &empty, &file].concat();
        let mut read = Vec::new();
        let mut slow = Decompressor::new(compression, BufReader::new(Drops(&twice, 0)));
        slow.read_to_end(&mut read).unwrap();
        assert_same(&read, &disk.repeat(2), words);
        // What is behind the end is no part of the file.
        for garbage in [&b"garbage"[..], b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\0"] {
            let longer = [&file[..], garbage].concat();
            unpack(compression, &longer).unwrap_err();
        }
    }
}

#[test]
fn a_skippable_frame_of_zstd_and_the_padding_of_xz_are_skipped() {
    let test = "a_skippable_frame_of_zstd_and_the_padding_of_xz_are_skipped";
    if Workshop::or_skip(test, &["xz", "zstd"]).is_none() {
        return;
    }
    let frame = filter("zstd -q -c", b"image");
    let skipped = [b"\x50\x2a\x4d\x18\x03\0\0\0abc".as_slice(), &frame].concat();
    let both = [&frame[..], &skipped].concat();
    assert_eq!(unpack(Compression::Zstd, &both).unwrap(), b"imageimage");
    let cut = &both[..frame.len() + 9];
    unpack(Compression::Zstd, cut).unwrap_err();
    let padded = [&filter("xz -c", b"image")[..], &[0; 8]].concat();
    assert_eq!(unpack(Compression::Xz, &padded).unwrap(), b"image");
}

/// A dictionary or a window of gigabytes would be allocated before the first byte comes.
#[test]
fn a_file_that_needs_too_much_memory_is_refused_before_it_is_allocated() {
    let test = "a_file_that_needs_too_much_memory_is_refused_before_it_is_allocated";
    if Workshop::or_skip(test, &["xz"]).is_none() {
        return;
    }
    // A window of 2^27 and of 2^28 bytes, and one block without compression.
    for (descriptor, is_read) in [(17 << 3, true), (18 << 3, false), (0xff, false)] {
        let frame = [
            &b"\x28\xb5\x2f\xfd\0"[..],
            &[descriptor, 0x29, 0, 0],
            b"image",
        ]
        .concat();
        let read = unpack(Compression::Zstd, &frame);
        assert_eq!(read.is_ok(), is_read, "{read:?}");
    }
    let file = filter("xz -6 -c", b"image");
    // The dictionary's size is the only property of the only filter (The .xz File Format, 5.3.1).
    assert_eq!(file[14..17], [0x21, 1, 22]);
    for (size, is_read) in [(22, true), (30, true), (32, false), (40, false)] {
        let mut file = file.clone();
        file[16] = size;
        let end = 12 + (usize::from(file[12]) + 1) * 4 - 4;
        let mut crc = flate2::Crc::new();
        crc.update(&file[12..end]);
        file[end..end + 4].copy_from_slice(&crc.sum().to_le_bytes());
        let read = unpack(Compression::Xz, &file);
        assert_eq!(read.is_ok(), is_read, "{size}: {read:?}");
    }
}

#[test]
fn a_damaged_file_is_an_error_or_read_right() {
    let test = "a_damaged_file_is_an_error_or_read_right";
    if Workshop::or_skip(test, &["gzip", "xz", "zstd"]).is_none() {
        return;
    }
    let disk = &disk(400_000)[200_000..320_000];
    for compression in Compression::ALL {
        let name = compression.name();
        let file = filter(&format!("{name} -c"), disk);
        for length in (0..file.len()).step_by(file.len() / 100 + 1) {
            let cut = unpack(compression, &file[..length]);
            // Nothing at all is an empty file of frames.
            assert!(
                cut.is_err() || (length == 0 && cut.unwrap().is_empty()),
                "{name} {length}"
            );
        }
        for at in (0..file.len()).step_by(file.len() / 400 + 1).chain(0..64) {
            for bit in 0..8 {
                let mut file = file.clone();
                file[at] ^= 1 << bit;
                if let Ok(read) = unpack(compression, &file) {
                    assert_same(&read, disk, &format!("{name}: bit {bit} of byte {at}"));
                }
            }
        }
    }
}
