//! The envelope that every metadata block shares: one record, 512 bytes, sealed with a checksum.
//!
//! ```text
//! offset size  field
//!      0    4  magic "BSCL"
//!      4    2  kind (see `Kind`)
//!      6    2  version of this kind's body, 1
//!      8    4  CRC32C over all 512 bytes, these four taken as zero
//!     12    4  zero
//!     16   16  volume id
//!     32    8  own address: the LBA at which this block lies
//!     40    8  epoch: what orders two blocks of this kind (its meaning is in the kind's table)
//!     48  464  body, zero to its end
//! ```
//!
//! All integers are little-endian. A sealed record lies in the first 512 bytes of a 4096-byte
//! block of its own, whose rest is zero, so that it is one logical block on 512-byte and on 4Kn
//! devices alike.

use bascule_types::{Lba, VolumeId};

/// The size of a block of the volume: the unit of addresses and of metadata I/O.
pub const BLOCK_BYTES: usize = 4096;
/// The size of a sealed record: what is written atomically.
pub const RECORD_BYTES: usize = 512;
/// The size of a record's body.
pub const BODY_BYTES: usize = RECORD_BYTES - HEADER_BYTES;

const HEADER_BYTES: usize = 48;
const MAGIC: [u8; 4] = *b"BSCL";
const CRC_OFFSET: usize = 8;
const BODY_VERSION: u16 = 1;

/// What a metadata block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The superblock.
    Superblock,
    /// [`crate::HeartbeatRecord`].
    Heartbeat,
    /// [`crate::PaxosBlock`].
    Paxos,
    /// [`crate::LeaderBlock`].
    Leader,
    /// The head of a checkpoint.
    CheckpointHead,
    /// One row of a checkpoint.
    CheckpointRow,
    /// One record of a journal.
    Journal,
}

impl Kind {
    /// The number on the volume.
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
        }
    }
}

/// Where a block lies; it says so itself, and a block that lies elsewhere is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The volume.
    pub volume: VolumeId,
    /// The address on it.
    pub lba: Lba,
}

/// Why bytes are not the record that should lie here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FormatError {
    /// Fewer than 512 bytes.
    #[error("{0} bytes are too few for a record")]
    Short(usize),
    /// Only zeroes: nothing was ever written here.
    #[error("the block was never written")]
    Blank,
    /// Not a block of this format.
    #[error("the magic is missing: not a block of a Bascule volume")]
    Magic,
    /// The bytes were altered, or torn.
    #[error("the checksum does not match")]
    Checksum,
    /// A block of another kind.
    #[error("a block of kind {found} lies where kind {wanted} belongs")]
    Kind {
        /// What should lie here.
        wanted: u16,
        /// What lies here.
        found: u16,
    },
    /// Written by a later release.
    #[error("version {found} of this block is newer than {known}, the last one known here")]
    Newer {
        /// The block's version.
        found: u16,
        /// The newest known.
        known: u16,
    },
    /// A block of another volume.
    #[error("the block belongs to volume {0}")]
    ForeignVolume(VolumeId),
    /// A block that was meant for another address.
    #[error("the block says that it belongs at {found:?}, not at {here:?}")]
    Misplaced {
        /// Where it was read.
        here: Lba,
        /// Where it belongs.
        found: Lba,
    },
    /// A field has no meaning.
    #[error("the field {0} has no meaning")]
    Field(&'static str),
}

/// A record that has a place on the volume.
pub trait Record: Sized {
    /// Its kind.
    const KIND: Kind;

    /// What orders two blocks of this kind.
    fn epoch(&self) -> u64;

    /// Writes the body.
    fn encode(&self, body: &mut BodyWriter<'_>);

    /// Reads the body. `epoch` is the header's.
    ///
    /// # Errors
    /// [`FormatError::Field`] for a value without meaning.
    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError>;
}

/// The 512 bytes of `record` at `place`.
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

/// The whole 4096-byte block of `record` at `place`.
#[must_use]
pub fn seal_block<R: Record>(record: &R, place: Place) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    block[..RECORD_BYTES].copy_from_slice(&seal(record, place));
    block
}

/// The record that lies in `bytes`, read from `place`. Bytes beyond the first 512 are not looked
/// at.
///
/// # Errors
/// [`FormatError`] for bytes that are not a whole record of this kind, volume and place.
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

/// The parts of the envelope that a reader compares.
pub(crate) struct Header {
    pub(crate) volume: VolumeId,
    pub(crate) lba: Lba,
    pub(crate) epoch: u64,
}

/// Checks magic, checksum, kind and version, in this order: a later release may change everything
/// but the envelope.
pub(crate) fn open_envelope(
    bytes: &[u8],
    kind: Kind,
) -> Result<(Header, BodyReader<'_>), FormatError> {
    let Some(record) = bytes.first_chunk::<RECORD_BYTES>() else {
        return Err(FormatError::Short(bytes.len()));
    };
    if record.iter().all(|byte| *byte == 0) {
        return Err(FormatError::Blank);
    }
    let mut reader = BodyReader { rest: record };
    if reader.array::<4>() != MAGIC {
        return Err(FormatError::Magic);
    }
    let (found, version, crc) = (reader.u16(), reader.u16(), reader.u32());
    reader.u32();
    if crc != checksum(record) {
        return Err(FormatError::Checksum);
    }
    if found != kind.code() {
        let wanted = kind.code();
        return Err(FormatError::Kind { wanted, found });
    }
    if version > BODY_VERSION {
        let known = BODY_VERSION;
        return Err(FormatError::Newer {
            found: version,
            known,
        });
    }
    let header = Header {
        volume: VolumeId::from_bytes(reader.array()),
        lba: Lba(reader.u64()),
        epoch: reader.u64(),
    };
    Ok((header, reader))
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

    /// Raw bytes.
    ///
    /// # Panics
    /// When the record's fields do not fit its body: the byte tables are wrong.
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

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// A text of at most `room` bytes: its length in one byte, then `room` bytes.
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

    /// `count` zero bytes.
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
}

impl<'a> BodyReader<'a> {
    /// A reader of `rest`.
    #[must_use]
    pub const fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    /// `N` raw bytes; zeroes past the end.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        match self.rest.split_first_chunk::<N>() {
            Some((head, tail)) => {
                self.rest = tail;
                *head
            }
            None => {
                self.rest = &[];
                [0; N]
            }
        }
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
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

    /// A text as [`BodyWriter::text`] wrote it.
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
