//! The envelope of every metadata record: 512 bytes, sealed with a checksum.
//!
//! ```text
//! offset size  field
//!      0    4  magic "BSCL"
//!      4    2  kind (see `Kind`)
//!      6    2  version of this kind's body, 2
//!      8    4  CRC32C over all 512 bytes, these four taken as zero
//!     12    4  zero
//!     16   16  volume id
//!     32    8  own address: the LBA at which this block lies
//!     40    8  epoch: orders two blocks of this kind (its meaning is in the kind's table)
//!     48  464  body, zero to its end
//! ```
//!
//! All integers are little-endian. A sealed record takes the first 512 bytes of a 4096-byte block
//! of its own, whose rest is zero: it lies in one logical block, which is written atomically, on
//! 512-byte and on 4Kn devices alike.

use std::cmp::Ordering;

use bascule_types::{Lba, VolumeId};

use crate::features::Features;

/// The size of a block of the volume: the unit of addresses and of metadata I/O.
pub const BLOCK_BYTES: usize = 4096;
/// The size of a sealed record: the unit of atomic writes.
pub const RECORD_BYTES: usize = 512;
/// The size of a record's body: what the 48-byte header leaves.
pub const BODY_BYTES: usize = RECORD_BYTES - HEADER_BYTES;

const HEADER_BYTES: usize = 48;
const MAGIC: [u8; 4] = *b"BSCL";
const CRC_OFFSET: usize = 8;
const BODY_VERSION: u16 = 2;

/// The type of a metadata record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are named after the record types")]
pub enum Kind {
    Superblock,
    Heartbeat,
    Paxos,
    Leader,
    CheckpointHead,
    CheckpointRow,
    Journal,
    UnfinishedFormat,
}

impl Kind {
    /// The number in the header of a record.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            Self::Superblock => 1,
            Self::Heartbeat => 2,
            Self::Paxos => 3,
            Self::Leader => 4,
            Self::CheckpointHead => 5,
            Self::CheckpointRow => 6,
            Self::Journal => 7,
            Self::UnfinishedFormat => 8,
        }
    }
}

/// The position of a block. The block's header repeats it; a block whose header says otherwise is
/// refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Place {
    pub volume: VolumeId,
    pub lba: Lba,
}

/// Why bytes are not the expected record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum FormatError {
    /// Fewer than 512 bytes.
    #[error("{0} bytes are too few for a record")]
    Short(usize),
    /// Only zeroes, as `format` leaves the block.
    #[error("the block was never written")]
    Blank,
    /// The bytes do not start with `BSCL`.
    #[error("the magic is missing: not a block of a Bascule volume")]
    Magic,
    /// The bytes were altered, or the write was torn.
    #[error("the checksum does not match")]
    Checksum,
    /// A block of another kind.
    #[error("a block of kind {found} lies where kind {wanted} belongs")]
    Kind { wanted: u16, found: u16 },
    /// Written by a later release.
    #[error("version {found} of this block is newer than {known}, the last one known here")]
    Newer { found: u16, known: u16 },
    /// Written by an earlier release.
    #[error("version {found} of this block is older than {known}, the only one known here")]
    Older { found: u16, known: u16 },
    /// A block of another volume.
    #[error("the block belongs to volume {0}")]
    ForeignVolume(VolumeId),
    /// The header names another address: the write or the read went to the wrong block.
    #[error("the block says that it belongs at {found:?}, not at {here:?}")]
    Misplaced {
        /// The address from which the block was read.
        here: Lba,
        /// The address in the block's header.
        found: Lba,
    },
    /// The volume has features without which it must not be used.
    #[error("it has the features {0}, which this release does not know")]
    Features(Features),
    /// A field has a value that this version does not define.
    #[error("the field {0} has an undefined value")]
    Field(&'static str),
}

/// A record with an envelope.
pub trait Record: Sized {
    /// The number in the header.
    const KIND: Kind;

    /// The header's epoch: orders two blocks of this kind.
    fn epoch(&self) -> u64;

    /// Writes the body, from offset 48 on.
    fn encode(&self, body: &mut BodyWriter<'_>);

    /// Reads the body. `epoch` is the header's.
    ///
    /// # Errors
    /// [`FormatError::Field`] for an undefined value.
    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError>;
}

/// The 512 bytes of `record` at `place`, with checksum.
#[must_use]
pub fn seal<R: Record>(record: &R, place: Place) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    let mut header = BodyWriter { rest: &mut bytes };
    header.bytes(&MAGIC);
    header.u16(R::KIND.code());
    header.u16(BODY_VERSION);
    header.u32(0);
    header.u32(0);
    header.bytes(&place.volume.to_bytes());
    header.u64(place.lba.0);
    header.u64(record.epoch());
    record.encode(&mut header);
    let crc = checksum(&bytes);
    bytes[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The 4096-byte block of `record` at `place`, zero behind the record.
#[must_use]
pub fn seal_block<R: Record>(record: &R, place: Place) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    block[..RECORD_BYTES].copy_from_slice(&seal(record, place));
    block
}

/// Parses the record in `bytes`, which were read from `place`. Ignores bytes beyond the first 512.
///
/// # Errors
/// [`FormatError`] for bytes that are not an undamaged record of this kind, volume and place.
pub fn open<R: Record>(bytes: &[u8], place: Place) -> Result<R, FormatError> {
    let (header, mut body) = open_envelope(bytes, R::KIND)?;
    if header.volume != place.volume {
        return Err(FormatError::ForeignVolume(header.volume));
    }
    if header.lba != place.lba {
        return Err(FormatError::Misplaced {
            here: place.lba,
            found: header.lba,
        });
    }
    R::parse(header.epoch, &mut body)
}

/// The fields of the header that a reader compares with the place.
pub(crate) struct Header {
    pub(crate) volume: VolumeId,
    pub(crate) lba: Lba,
    pub(crate) epoch: u64,
}

/// A record of any kind and version whose checksum matches: a later release may change any body, and keeps
/// the header.
struct Intact<'a> {
    kind: u16,
    version: u16,
    header: Header,
    body: BodyReader<'a>,
}

/// Checks magic and checksum, in this order.
fn open_intact(bytes: &[u8]) -> Result<Intact<'_>, FormatError> {
    let Some(record) = bytes.first_chunk::<RECORD_BYTES>() else {
        return Err(FormatError::Short(bytes.len()));
    };
    if record.iter().all(|byte| *byte == 0) {
        return Err(FormatError::Blank);
    }
    let mut reader = BodyReader::new(record);
    if reader.array::<4>() != MAGIC {
        return Err(FormatError::Magic);
    }
    let (kind, version, crc) = (reader.u16(), reader.u16(), reader.u32());
    reader.u32();
    if crc != checksum(record) {
        return Err(FormatError::Checksum);
    }
    let header = Header {
        volume: VolumeId::from_bytes(reader.array()),
        lba: Lba(reader.u64()),
        epoch: reader.u64(),
    };
    Ok(Intact {
        kind,
        version,
        header,
        body: reader,
    })
}

/// Checks magic, checksum, kind and version, in this order.
pub(crate) fn open_envelope(
    bytes: &[u8],
    kind: Kind,
) -> Result<(Header, BodyReader<'_>), FormatError> {
    let intact = open_intact(bytes)?;
    let (wanted, found) = (kind.code(), intact.kind);
    if found != wanted {
        return Err(FormatError::Kind { wanted, found });
    }
    check_version(intact.version, BODY_VERSION)?;
    Ok((intact.header, intact.body))
}

/// The volume to which an intact record of any kind and version says that it belongs.
pub(crate) fn volume_of(bytes: &[u8]) -> Option<VolumeId> {
    open_intact(bytes).ok().map(|intact| intact.header.volume)
}

/// Accepts exactly the known version: no release reads what an earlier or a later one wrote differently.
pub(crate) fn check_version(found: u16, known: u16) -> Result<(), FormatError> {
    match found.cmp(&known) {
        Ordering::Less => Err(FormatError::Older { found, known }),
        Ordering::Equal => Ok(()),
        Ordering::Greater => Err(FormatError::Newer { found, known }),
    }
}

/// CRC32C over a record whose checksum field counts as zero.
fn checksum(record: &[u8; RECORD_BYTES]) -> u32 {
    let crc = crc32c::crc32c(&record[..CRC_OFFSET]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &record[CRC_OFFSET + 4..])
}

/// Writes little-endian fields in order.
#[derive(Debug)]
pub struct BodyWriter<'a> {
    rest: &'a mut [u8],
}

impl<'a> BodyWriter<'a> {
    /// A writer into `rest`.
    pub fn new(rest: &'a mut [u8]) -> Self {
        Self { rest }
    }

    /// Appends raw bytes.
    ///
    /// # Panics
    /// When the record's fields do not fit its body, which is an error in its `encode`.
    pub fn bytes(&mut self, bytes: &[u8]) {
        let rest = std::mem::take(&mut self.rest);
        assert!(
            rest.len() >= bytes.len(),
            "a record's fields fit into its body"
        );
        let (head, tail) = rest.split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.rest = tail;
    }

    /// How many more bytes fit.
    #[must_use]
    pub const fn room(&self) -> usize {
        self.rest.len()
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// Appends a string field of 1 + `room` bytes: the length in one byte, then the string, padded
    /// with zeroes.
    ///
    /// # Panics
    /// When the text is longer than `room`.
    pub fn text(&mut self, text: &str, room: usize) {
        let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
        assert!(text.len() <= room, "a text fits its field");
        self.u8(length);
        self.bytes(text.as_bytes());
        self.zeroes(room - text.len());
    }

    /// Appends `count` zero bytes.
    pub fn zeroes(&mut self, count: usize) {
        for _ in 0..count {
            self.u8(0);
        }
    }
}

/// Reads little-endian fields in order. Past the end it yields zeroes, as the body's unused tail
/// does.
#[derive(Debug)]
pub struct BodyReader<'a> {
    rest: &'a [u8],
    /// More was read than there is.
    overrun: bool,
}

impl<'a> BodyReader<'a> {
    /// A reader of `rest`.
    #[must_use]
    pub const fn new(rest: &'a [u8]) -> Self {
        Self {
            rest,
            overrun: false,
        }
    }

    /// A reader of the next `length` bytes; none if there are fewer.
    pub fn take(&mut self, length: usize) -> Option<Self> {
        let (head, tail) = self.rest.split_at_checked(length)?;
        self.rest = tail;
        Some(Self::new(head))
    }

    /// Whether exactly all bytes were read.
    #[must_use]
    pub const fn is_exhausted(&self) -> bool {
        self.rest.is_empty() && !self.overrun
    }

    /// The next `N` bytes; zeroes past the end.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        match self.rest.split_first_chunk::<N>() {
            Some((head, tail)) => {
                self.rest = tail;
                *head
            }
            None => {
                self.rest = &[];
                self.overrun = true;
                [0; N]
            }
        }
    }

    /// The next byte; 0 past the end.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A byte that is 0 or 1.
    ///
    /// # Errors
    /// [`FormatError::Field`] with `name` for any other.
    pub fn flag(&mut self, name: &'static str) -> Result<bool, FormatError> {
        match self.u8() {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(FormatError::Field(name)),
        }
    }

    /// A string field as [`BodyWriter::text`] writes it.
    ///
    /// # Errors
    /// [`FormatError::Field`] with `name` for a length beyond `ROOM` or bytes that are not UTF-8.
    pub fn text<const ROOM: usize>(&mut self, name: &'static str) -> Result<String, FormatError> {
        let length = usize::from(self.u8());
        let bytes = self.array::<ROOM>();
        let text = bytes.get(..length).ok_or(FormatError::Field(name))?;
        String::from_utf8(text.to_vec()).map_err(|_| FormatError::Field(name))
    }
}
