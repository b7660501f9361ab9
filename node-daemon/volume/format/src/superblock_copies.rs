//! The two copies of the superblock: which one counts when a volume is opened, and in which order they are
//! rewritten.
//!
//! The first copy is block 0, the last one the first block of the volume's last MiB. The first names the volume's
//! length, so the last one is found although the device may have grown. Only without the first is the last one looked
//! for where the device ends.
//!
//! # Guarantees
//! - The higher revision of two intact copies counts. A copy that is damaged or older is reported, never used.
//! - A rewrite that ends at any write or flush, with any block torn, leaves a volume that opens with the old or with
//!   the new revision: one intact copy of the revision that counts is never written before the other one is durable.
//! - An intact copy that this release does not understand refuses the volume, whatever the other one says: it may be
//!   the newer one, and its flags may forbid what this release would do.
//! - Without the first copy, the last one does not count if blocks of another volume lie where its heartbeats belong.

use std::cmp::Ordering;
use std::fmt;
use std::io;

use bascule_types::{Lba, VolumeId};

use crate::block_store::BlockStore;
use crate::envelope::{BLOCK_BYTES, FormatError, Kind, seal_block, volume_of};
use crate::features::{Features, UnknownFeatures};
use crate::heartbeat::HEARTBEAT_RECORDS;
use crate::superblock::{FIRST_COPY, Superblock, last_copy};

/// Why a device cannot be opened as a volume.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device failed.
    #[error("cannot read the superblock")]
    Io(#[source] io::Error),
    /// Neither superblock has the magic: not a Bascule volume.
    #[error("the device holds no Bascule volume (magic missing in both superblocks)")]
    NotAVolume,
    /// Both superblocks are still to be written.
    #[error("the device holds no Bascule volume: its format has not finished")]
    Unfinished,
    /// The volume was formatted or upgraded by a later release.
    #[error("the volume's format is newer than this release knows")]
    Newer(#[source] FormatError),
    /// The volume was formatted by an earlier release, whose format this one does not read.
    #[error(
        "the volume's format is of an earlier release, and this one does not read it: format the device"
    )]
    Older(#[source] FormatError),
    /// Neither superblock is intact.
    #[error(
        "both superblocks are damaged (the last one is looked for where the device ends: not if it has grown)"
    )]
    Damaged(#[source] FormatError),
    /// Both superblocks are intact, and of two volumes.
    #[error(
        "the two superblocks are of two volumes, {first} and {last}: format the device, or restore one"
    )]
    TwoVolumes {
        /// The volume of the first copy.
        first: VolumeId,
        /// The volume of the last copy.
        last: VolumeId,
    },
    /// The first superblock is damaged, and the last one is that of an earlier volume of the device.
    #[error(
        "the first superblock is damaged, the last one is of volume {last}, and the heartbeats are of volume {found}: \
         format the device, or restore the first superblock"
    )]
    ForeignHeartbeats {
        /// The volume of the last copy.
        last: VolumeId,
        /// The volume to which a heartbeat block belongs.
        found: VolumeId,
    },
    /// Both superblocks are intact, have the same revision, and differ.
    #[error(
        "the two superblocks have revision {revision} both, and differ: neither can be trusted"
    )]
    CopiesDiffer {
        /// The revision of both.
        revision: u64,
    },
    /// The device is smaller than the superblock says.
    #[error("the device is smaller than the volume, which has {blocks} blocks of 4096 bytes")]
    Truncated {
        /// The volume's size in blocks.
        blocks: u64,
    },
}

/// Why a superblock was not rewritten, or not completely.
#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    /// The device cannot be opened as a volume.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The device failed: the volume has the old superblock or the new one.
    #[error("cannot write the superblock")]
    Io(#[source] io::Error),
    /// This release must not write the volume.
    #[error(transparent)]
    Unknown(#[from] UnknownFeatures),
    /// The new superblock has no higher revision than the one that counts, or another layout.
    #[error("the superblock was rewritten meanwhile, or its layout was to be changed")]
    Conflict,
    /// No reader would accept the new superblock. Nothing was written.
    #[error("the new superblock is not valid")]
    Invalid(#[source] FormatError),
}

/// What the two copies say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copies {
    /// The superblock that counts.
    pub current: Superblock,
    /// The copy that does not say the same, if there is one. `repair` writes it again, as does the next rewrite.
    pub stale: Option<StaleCopy>,
}

/// A copy of the superblock that does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleCopy {
    /// The block in which it lies.
    pub lba: Lba,
    /// What is wrong with it.
    pub fault: CopyFault,
}

/// Why a copy of the superblock does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyFault {
    /// A rewrite did not reach it.
    OutOfDate {
        /// Its revision; the other copy's is higher.
        revision: u64,
    },
    /// It cannot be read as a superblock.
    Damaged(FormatError),
}

impl fmt::Display for StaleCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "superblock copy at block {}: ", self.lba.0)?;
        match self.fault {
            CopyFault::OutOfDate { revision } => {
                write!(f, "out of date, it has revision {revision}")
            }
            CopyFault::Damaged(error) => write!(f, "{error}"),
        }
    }
}

/// Reads the superblock of a volume that this release may read: the undamaged copy with the highest revision.
///
/// # Errors
/// As [`read_copies`].
pub fn read_superblock<S: BlockStore>(store: &mut S) -> Result<Superblock, OpenError> {
    read_copies(store, Features::KNOWN).map(|copies| copies.current)
}

/// Reads both copies of the superblock, for a release that knows these features.
///
/// # Errors
/// [`OpenError`] distinguishes a foreign device, a damaged volume and a newer format. Two intact copies
/// must be of one volume, and equal if they have the same revision: `format` erases both before it
/// writes either.
pub fn read_copies<S: BlockStore>(store: &mut S, known: Features) -> Result<Copies, OpenError> {
    let first = read_copy(store, FIRST_COPY).map_err(OpenError::Io)?;
    let is_lone = first.is_err();
    let lba = match &first {
        Ok(first) => Some(first.last_copy()),
        Err(_) => last_copy(store.blocks().map_err(OpenError::Io)?),
    };
    let last = match lba {
        Some(lba) => read_copy(store, lba).map_err(OpenError::Io)?,
        None => Err(FormatError::Blank),
    };
    let copies = choose(understood(first, known), understood(last, known))?;
    check_length(store, &copies.current)?;
    if is_lone {
        check_heartbeats(store, &copies.current)?;
    }
    Ok(copies)
}

/// Refuses a copy with features without which the volume must not be used.
fn understood(
    copy: Result<Superblock, FormatError>,
    known: Features,
) -> Result<Superblock, FormatError> {
    let copy = copy?;
    let unknown = copy.features.incompat().without(known);
    if unknown.is_empty() {
        Ok(copy)
    } else {
        Err(FormatError::Features(unknown))
    }
}

/// Reads one copy of the superblock: the inner error says what is wrong with it.
fn read_copy<S: BlockStore>(
    store: &mut S,
    lba: Lba,
) -> io::Result<Result<Superblock, FormatError>> {
    let mut block = [0; BLOCK_BYTES];
    match store.read(lba, &mut block) {
        Ok(()) => {}
        // The device ends before it.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok(Err(FormatError::Blank));
        }
        Err(error) => return Err(error),
    }
    Ok(Superblock::parse_copy(&block, lba).and_then(|copy| {
        if copy.copy_lbas().contains(&lba) {
            return Ok(copy);
        }
        // The last copy of a volume that ends elsewhere.
        Err(FormatError::Misplaced {
            here: lba,
            found: copy.last_copy(),
        })
    }))
}

/// Every block of the device that a reader may take for a copy of the superblock: the first, the last one of the
/// volume that the first describes, and the one where the device ends.
pub(crate) fn possible_copies<S: BlockStore>(store: &mut S) -> io::Result<Vec<Lba>> {
    let described = read_copy(store, FIRST_COPY)?.ok();
    let described = described.map(|superblock| superblock.last_copy());
    let end = last_copy(store.blocks()?);
    let mut lbas: Vec<_> = [Some(FIRST_COPY), described, end]
        .into_iter()
        .flatten()
        .collect();
    lbas.dedup();
    Ok(lbas)
}

/// Replaces the superblock by `next`: the one that counts now, but for its features, fencing, policy and timings, and with a
/// higher revision. Writes and flushes one copy, then the other; one that is damaged or out of date is the first to be
/// written, because the volume cannot be opened without the other one. If `next` counts already, only the other copy
/// is written, if it needs to be.
///
/// # Assumes
/// A revision is never used for two contents: two writers, or a write of an earlier rewrite that lands late, would leave
/// two copies that contradict each other. With that, a late write can only bring an older revision back.
///
/// # Errors
/// [`RewriteError`]. After [`RewriteError::Io`] the volume opens with the old or with the new superblock.
pub fn rewrite_superblock<S: BlockStore>(
    store: &mut S,
    next: &Superblock,
    known: Features,
) -> Result<(), RewriteError> {
    let Copies { current, stale } = read_copies(store, known)?;
    current.check_writable(known)?;
    let stale = stale.map(|stale| stale.lba);
    if current == *next {
        return write_copies(store, next, stale);
    }
    check_successor(&current, next, known)?;
    let mut lbas = next.copy_lbas();
    if stale == Some(next.last_copy()) {
        lbas.reverse();
    }
    write_copies(store, next, lbas)
}

/// Writes and flushes one copy after the other.
fn write_copies<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    lbas: impl IntoIterator<Item = Lba>,
) -> Result<(), RewriteError> {
    for lba in lbas {
        let block = seal_block(superblock, superblock.place(lba));
        store.write(lba, &block).map_err(RewriteError::Io)?;
        store.flush().map_err(RewriteError::Io)?;
    }
    Ok(())
}

/// Refuses to replace `current` by `next` where that changes the layout, or where no reader would accept it.
fn check_successor(
    current: &Superblock,
    next: &Superblock,
    known: Features,
) -> Result<(), RewriteError> {
    let unchanged = Superblock {
        revision: current.revision,
        features: current.features,
        fencing: current.fencing,
        policy: current.policy,
        timings: current.timings,
        ..next.clone()
    };
    if unchanged != *current || next.revision <= current.revision {
        return Err(RewriteError::Conflict);
    }
    next.check_writable(known)?;
    let block = seal_block(next, next.place(FIRST_COPY));
    let parsed = Superblock::parse_copy(&block, FIRST_COPY);
    parsed.map(drop).map_err(RewriteError::Invalid)
}

/// Which of the two copies counts.
fn choose(
    first: Result<Superblock, FormatError>,
    last: Result<Superblock, FormatError>,
) -> Result<Copies, OpenError> {
    match (first, last) {
        (Ok(first), Ok(last)) => choose_newer(first, last),
        (Ok(current), Err(error)) => {
            let lba = current.last_copy();
            beside(current, lba, error)
        }
        (Err(error), Ok(current)) => beside(current, FIRST_COPY, error),
        (Err(first), Err(last)) => Err(neither(first, last)),
    }
}

/// The copy with the higher revision of two intact ones.
fn choose_newer(first: Superblock, last: Superblock) -> Result<Copies, OpenError> {
    if first.volume != last.volume {
        return Err(OpenError::TwoVolumes {
            first: first.volume,
            last: last.volume,
        });
    }
    let out_of_date = |lba, older: &Superblock| {
        let revision = older.revision;
        let fault = CopyFault::OutOfDate { revision };
        Some(StaleCopy { lba, fault })
    };
    match first.revision.cmp(&last.revision) {
        Ordering::Greater => Ok(Copies {
            stale: out_of_date(first.last_copy(), &last),
            current: first,
        }),
        Ordering::Less => Ok(Copies {
            stale: out_of_date(FIRST_COPY, &first),
            current: last,
        }),
        Ordering::Equal if first == last => Ok(Copies {
            current: first,
            stale: None,
        }),
        Ordering::Equal => Err(OpenError::CopiesDiffer {
            revision: first.revision,
        }),
    }
}

/// An intact copy beside one, at `lba`, that is refused with `error`.
fn beside(current: Superblock, lba: Lba, error: FormatError) -> Result<Copies, OpenError> {
    if let Some(refusal) = not_understood(error) {
        return Err(refusal);
    }
    let fault = CopyFault::Damaged(error);
    let stale = Some(StaleCopy { lba, fault });
    Ok(Copies { current, stale })
}

/// Why there is no superblock.
fn neither(first: FormatError, last: FormatError) -> OpenError {
    if let Some(refusal) = not_understood(first).or_else(|| not_understood(last)) {
        return refusal;
    }
    let is_absent = |error| matches!(error, FormatError::Blank | FormatError::Magic);
    let damaged = [first, last]
        .into_iter()
        .find(|error| !is_absent(*error) && !is_unfinished(*error));
    match damaged {
        Some(error) => OpenError::Damaged(error),
        None if is_unfinished(first) || is_unfinished(last) => OpenError::Unfinished,
        None => OpenError::NotAVolume,
    }
}

/// The refusal of a volume with a copy that is intact, and that another release wrote.
fn not_understood(error: FormatError) -> Option<OpenError> {
    match error {
        FormatError::Newer { .. } | FormatError::Features(_) | FormatError::Field(_) => {
            Some(OpenError::Newer(error))
        }
        FormatError::Older { .. } => Some(OpenError::Older(error)),
        _ => None,
    }
}

fn is_unfinished(error: FormatError) -> bool {
    let unfinished = Kind::UnfinishedFormat.code();
    matches!(error, FormatError::Kind { found, .. } if found == unfinished)
}

/// Refuses a device that is smaller than the volume.
fn check_length<S: BlockStore>(store: &mut S, superblock: &Superblock) -> Result<(), OpenError> {
    let last = Lba(superblock.blocks.saturating_sub(1));
    let mut block = [0; BLOCK_BYTES];
    match store.read(last, &mut block) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(OpenError::Truncated {
            blocks: superblock.blocks,
        }),
        Err(error) => Err(OpenError::Io(error)),
    }
}

/// Refuses a last copy that an earlier volume has left on the device: blocks of another volume lie where its
/// heartbeats belong.
fn check_heartbeats<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
) -> Result<(), OpenError> {
    let mut block = [0; BLOCK_BYTES];
    for slot in superblock.slots() {
        for record in 0..HEARTBEAT_RECORDS {
            let lba = superblock.heartbeat_lba(slot, record);
            store.read(lba, &mut block).map_err(OpenError::Io)?;
            let last = superblock.volume;
            if let Some(found) = volume_of(&block).filter(|found| *found != last) {
                return Err(OpenError::ForeignHeartbeats { last, found });
            }
        }
    }
    Ok(())
}
