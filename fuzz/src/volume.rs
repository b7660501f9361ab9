//! The blocks of a shared volume.

use std::fmt::Debug;
use std::sync::OnceLock;

use arbitrary::{Arbitrary, Unstructured};
use bascule_types::{ClusterId, Lba, NodeUid, VolumeId};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore, BodyReader, BodyWriter, CheckpointHead, CheckpointRow, Fencing,
    FencingPolicy, FormatError, FormatRequest, HeartbeatRecord, JournalBlock, Kind, LeaderBlock,
    MemStore, PaxosBlock, Place, Record, Superblock, Timings, UnfinishedFormat, check_volume,
    make_volume, open, plan_repair, seal,
};

/// A record of a kind with any body.
#[derive(Arbitrary, Debug)]
struct Forged {
    kind: u8,
    epoch: u64,
    body: Vec<u8>,
}

/// A change of a block of the volume.
#[derive(Arbitrary, Debug)]
enum Change {
    /// Forges the record, with a right checksum, at a place of its kind or anywhere.
    Forge { at: u16, record: Forged },
    /// Changes a byte of the block.
    Damage { at: u16, byte: u16, flip: u8 },
    /// Changes a byte of the block's record and makes its checksum right again.
    Reseal { at: u16, byte: u16, flip: u8 },
    /// Copies a block to another place.
    Copy { from: u16, to: u16 },
}

pub(crate) fn record(data: &[u8]) {
    let Some(([kind, epoch @ ..], body)) = data.split_first_chunk::<9>() else {
        return;
    };
    let forged = Forged {
        kind: *kind,
        epoch: u64::from_le_bytes(*epoch),
        body: body.to_vec(),
    };
    let place = Place {
        volume: VOLUME,
        lba: Lba(0x1234),
    };
    let bytes = forged.seal(place);
    match kind_of(forged.kind) {
        Kind::Superblock => {
            if let Ok(superblock) = Superblock::parse_copy(&bytes, place.lba) {
                let again = Superblock::parse_copy(&seal(&superblock, place), place.lba);
                assert_eq!(again.as_ref(), Ok(&superblock));
                assert_eq!(superblock.regions.len(), 7, "one region of each kind");
            }
        }
        Kind::Heartbeat => reads_back::<HeartbeatRecord>(&bytes, place),
        Kind::Paxos => reads_back::<PaxosBlock>(&bytes, place),
        Kind::Leader => reads_back::<LeaderBlock>(&bytes, place),
        Kind::CheckpointHead => reads_back::<CheckpointHead>(&bytes, place),
        Kind::CheckpointRow => reads_back::<CheckpointRow>(&bytes, place),
        Kind::Journal => reads_back::<JournalBlock>(&bytes, place),
        Kind::UnfinishedFormat => reads_back::<UnfinishedFormat>(&bytes, place),
    }
}

/// What is accepted is sealed to bytes that read back as it, and those seal to themselves.
fn reads_back<R: Record + PartialEq + Debug>(bytes: &[u8], place: Place) {
    if let Ok(record) = open::<R>(bytes, place) {
        let sealed = seal(&record, place);
        let again = open::<R>(&sealed, place);
        assert_eq!(again.as_ref(), Ok(&record));
        assert_eq!(seal(&again.unwrap(), place), sealed);
    }
}

pub(crate) fn metadata(data: &[u8]) {
    let Ok(changes) = Vec::<Change>::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let (mut store, superblock) = formatted();
    for change in changes.iter().take(CHANGES_MAX) {
        change.apply(&mut store, &superblock);
    }
    store.flush().unwrap();
    let before = check_volume(&mut store).map(|report| report.worst());
    let planned = plan_repair(&mut store);
    assert!(store.unflushed().is_empty(), "check and plan write nothing");
    let Ok(repair) = planned else {
        return;
    };
    repair.perform(&mut store).unwrap();
    let again = plan_repair(&mut store).unwrap();
    assert!(again.steps.is_empty(), "one repair is enough: {again:?}");
    assert!(check_volume(&mut store).is_ok() || before.is_err());
}

impl Change {
    fn apply(&self, store: &mut MemStore, superblock: &Superblock) {
        let read = |store: &mut MemStore, lba| {
            let mut block = vec![0; BLOCK_BYTES];
            store.read(lba, &mut block).unwrap();
            block
        };
        match self {
            Self::Forge { at, record } => {
                let lba = lba(*at, superblock);
                let place = Place {
                    volume: superblock.volume,
                    lba,
                };
                let mut block = vec![0; BLOCK_BYTES];
                block[..512].copy_from_slice(&record.seal(place));
                store.write(lba, &block).unwrap();
            }
            Self::Damage { at, byte, flip } => {
                let lba = lba(*at, superblock);
                let mut block = read(store, lba);
                block[usize::from(*byte) % 512] ^= flip;
                store.write(lba, &block).unwrap();
            }
            Self::Reseal { at, byte, flip } => {
                let lba = lba(*at, superblock);
                let mut block = read(store, lba);
                block[48 + usize::from(*byte) % 464] ^= flip;
                checksum(&mut block);
                store.write(lba, &block).unwrap();
            }
            Self::Copy { from, to } => {
                let block = read(store, lba(*from, superblock));
                store.write(lba(*to, superblock), &block).unwrap();
            }
        }
    }
}

impl Forged {
    /// A record with a valid envelope around any body, so that it reaches the parser behind the checksum.
    fn seal(&self, place: Place) -> [u8; 512] {
        let mut bytes = seal(&Blank(self.epoch), place);
        bytes[4..6].copy_from_slice(&kind_of(self.kind).code().to_le_bytes());
        let length = self.body.len().min(464);
        bytes[48..48 + length].copy_from_slice(&self.body[..length]);
        checksum(&mut bytes);
        bytes
    }
}

/// A record with an empty body.
struct Blank(u64);

impl Record for Blank {
    const KIND: Kind = Kind::Heartbeat;

    fn epoch(&self) -> u64 {
        self.0
    }

    fn encode(&self, _body: &mut BodyWriter<'_>) {}

    fn parse(epoch: u64, _body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        Ok(Self(epoch))
    }
}

fn checksum(block: &mut [u8]) {
    block[8..12].fill(0);
    let crc = crc32c::crc32c(&block[..512]);
    block[8..12].copy_from_slice(&crc.to_le_bytes());
}

fn kind_of(number: u8) -> Kind {
    let kinds = [
        Kind::Superblock,
        Kind::Heartbeat,
        Kind::Paxos,
        Kind::Leader,
        Kind::CheckpointHead,
        Kind::CheckpointRow,
        Kind::Journal,
        Kind::UnfinishedFormat,
    ];
    kinds[usize::from(number) % kinds.len()]
}

/// One of the blocks that hold metadata: a copy of the superblock, or one of the regions up to the areas, of
/// which the first blocks are the likeliest.
fn lba(at: u16, superblock: &Superblock) -> Lba {
    let [kind, index] = at.to_le_bytes();
    let regions = &superblock.regions;
    let Some(region) = regions.get(usize::from(kind) % (regions.len() + 1)) else {
        return superblock.copy_lbas()[usize::from(index) % 2];
    };
    Lba(region.start.0 + u64::from(index) % region.blocks)
}

/// A small volume of two slots.
pub(crate) fn formatted() -> (MemStore, Superblock) {
    static FORMATTED: OnceLock<(MemStore, Superblock)> = OnceLock::new();
    FORMATTED.get_or_init(format).clone()
}

fn format() -> (MemStore, Superblock) {
    let request = FormatRequest {
        volume: VOLUME,
        cluster: ClusterId::from_bytes([0x22; 16]),
        fencing: Fencing::Watchdog,
        policy: FencingPolicy::default(),
        timings: Timings::DEFAULT,
        slot_count: 2,
        extent_mib: 1,
        device_bytes: DEVICE_BYTES,
    };
    let mut store = MemStore::new(DEVICE_BYTES / BLOCK_BYTES as u64);
    let node = NodeUid::from_bytes([0x33; 16]);
    let superblock = make_volume(&mut store, &request, Some(node)).unwrap();
    (store, superblock)
}

const VOLUME: VolumeId = VolumeId::from_bytes([0x11; 16]);
const DEVICE_BYTES: u64 = 32 << 20;
/// Changes of one input; a guess at what still runs fast.
const CHANGES_MAX: usize = 16;
