//! Images: what they are, and unpacking them.

use std::fs::File;
use std::io::{BufReader, Read as _, Write as _};

use arbitrary::{Arbitrary, Unstructured};
use bascule_image::{
    Compression, HEADER_BYTES, Inspection, QCOW2_HEADER_BYTES, Qcow2Header, Refusal, Role, packing,
};
use bascule_image_unpack::{Decompressor, Piece, Qcow2Disk};
use rustix::fs::{MemfdFlags, memfd_create};

/// An image that is mostly zeroes.
#[derive(Arbitrary, Debug)]
struct Sparse {
    role: u8,
    /// How the image is split when it is fed.
    pieces: Vec<u16>,
    /// What lies where.
    parts: Vec<(u32, Vec<u8>)>,
    length: u32,
}

pub(crate) fn inspection(data: &[u8]) {
    let Ok(input) = Sparse::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let mut image = vec![0; (input.length % SPARSE_BYTES_MAX) as usize];
    for (at, part) in &input.parts {
        put(&mut image, *at as usize, part);
    }
    let role = [Role::Disk, Role::Kernel, Role::Initrd][usize::from(input.role) % 3];
    let mut sizes = input.pieces.iter().map(|size| usize::from(*size)).cycle();
    let split = inspect(role, &image, || sizes.next().unwrap_or(0));
    assert_eq!(
        split,
        inspect(role, &image, || usize::MAX),
        "however it is split"
    );
    let header = &image[..image.len().min(HEADER_BYTES)];
    assert_eq!(packing(&image), packing(header), "the header is enough");
}

/// Feeds pieces of the given sizes; an empty one is fed as such, and then a byte.
fn inspect(role: Role, image: &[u8], mut size: impl FnMut() -> usize) -> Result<(), Refusal> {
    let mut inspection = Inspection::new(role);
    let mut rest = image;
    while !rest.is_empty() {
        let size = size();
        if size == 0 {
            inspection.feed(&[])?;
        }
        let (piece, left) = rest.split_at(size.clamp(1, rest.len()));
        inspection.feed(piece)?;
        rest = left;
    }
    inspection.finish()
}

/// The first byte selects the compression, and how the output is read.
pub(crate) fn decompression(data: &[u8]) {
    let Some((mode, file)) = data.split_first() else {
        return;
    };
    let compression = match mode % 3 {
        0 => Compression::Gzip,
        1 => Compression::Xz,
        _ => Compression::Zstd,
    };
    let whole = unpack(compression, file, OUTPUT_BYTES_MAX);
    let step = usize::from(mode / 3) * 7 + 1;
    let stepped = unpack(compression, file, step);
    if whole.is_some() || stepped.is_some() {
        assert_eq!(stepped, whole, "in steps of {step}");
    }
}

/// The whole output, in reads of at most `step` bytes; none if there is an error, or more than the limit.
fn unpack(compression: Compression, file: &[u8], step: usize) -> Option<Vec<u8>> {
    let mut reader = Decompressor::new(compression, BufReader::with_capacity(512, file));
    let mut output = Vec::new();
    let mut buffer = vec![0; step.min(4096)];
    while output.len() <= OUTPUT_BYTES_MAX {
        match reader.read(&mut buffer) {
            Ok(0) => return Some(output),
            Ok(read) => output.extend_from_slice(&buffer[..read]),
            Err(_) => return None,
        }
    }
    None
}

/// A qcow2 image: a valid one with changes.
#[derive(Arbitrary, Debug)]
struct Qcow2 {
    version_2: bool,
    cluster_bits: u8,
    /// Clusters of the file.
    clusters: u8,
    size: u32,
    /// 64-bit words that are replaced: where, in units of 4 bytes, and by what.
    words: Vec<(u16, u64)>,
    parts: Vec<(u32, Vec<u8>)>,
}

pub(crate) fn qcow2(data: &[u8]) {
    let Ok(input) = Qcow2::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let image = input.image();
    if Qcow2Header::parse(&image[..image.len().min(QCOW2_HEADER_BYTES)]).is_err() {
        return;
    }
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&image).unwrap();
    let Ok(mut disk) = Qcow2Disk::open(file) else {
        return;
    };
    let size = disk.size();
    let mut buffer = vec![0; 4096];
    let mut at = 0;
    for _ in 0..PIECES_MAX {
        match disk.next_piece(&mut buffer) {
            Err(_) => return,
            Ok(None) => return assert_eq!(at, size, "the pieces make up the disk"),
            Ok(Some(Piece::Data(read))) => {
                assert!(read == buffer.len() || at + read as u64 == size);
                at += read as u64;
            }
            Ok(Some(Piece::Zeroes(zeroes))) => {
                assert_ne!(zeroes, 0, "each piece is a step");
                at += zeroes;
                assert!(zeroes % buffer.len() as u64 == 0 || at == size);
            }
        }
        assert!(at <= size);
    }
}

impl Qcow2 {
    fn image(&self) -> Vec<u8> {
        let bits = 9 + usize::from(self.cluster_bits % 8);
        let cluster = 1_usize << bits;
        let mut image = vec![0; (4 + usize::from(self.clusters % 16)) * cluster];
        let version = if self.version_2 { 2_u32 } else { 3 };
        put(&mut image, 0, b"QFI\xfb");
        put(&mut image, 4, &version.to_be_bytes());
        put(&mut image, 20, &u32::try_from(bits).unwrap().to_be_bytes());
        put(&mut image, 24, &u64::from(self.size).to_be_bytes());
        let covered = (cluster as u64 / 8) << bits;
        let entries = u32::try_from(u64::from(self.size).div_ceil(covered)).unwrap();
        put(&mut image, 36, &entries.to_be_bytes());
        put(&mut image, 40, &(2 * cluster as u64).to_be_bytes());
        put(&mut image, 48, &(cluster as u64).to_be_bytes());
        put(&mut image, 56, &1_u32.to_be_bytes());
        put(&mut image, 96, &4_u32.to_be_bytes());
        put(&mut image, 100, &104_u32.to_be_bytes());
        // The first entry of the first-level table points at a second-level table.
        let entry = (3 * cluster as u64) | (1 << 63);
        put(&mut image, 2 * cluster, &entry.to_be_bytes());
        for (at, part) in &self.parts {
            put(&mut image, *at as usize, part);
        }
        for (at, word) in &self.words {
            put(&mut image, usize::from(*at) * 4, &word.to_be_bytes());
        }
        image
    }
}

/// Overwrites what lies within the image.
fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    let Some(room) = image.get_mut(at..) else {
        return;
    };
    let length = bytes.len().min(room.len());
    room[..length].copy_from_slice(&bytes[..length]);
}

/// More than the beginning of an image that is kept, 64 KiB.
const SPARSE_BYTES_MAX: u32 = 80 << 10;
/// Of a bomb, no more is unpacked.
const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// Pieces that are read of a disk; a guess at what still runs fast.
const PIECES_MAX: usize = 64;
