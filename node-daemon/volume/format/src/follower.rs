//! Follows the metadata of a coordinator, on a node that reads the volume and does not coordinate.
//!
//! # States
//! ```text
//!              ┌── new groups in the journal, or a checkpoint that follows it
//!              ▼                        │
//!   start ─► Follower ──────────────────┘
//!     ▲         │
//!     └─────────┴── a checkpoint that it has not followed, or a read that is inconsistent: recover
//! ```
//!
//! # Costs
//! A look reads two checkpoint heads of one slot and 64 KiB of the journal, however many rows there are; after an
//! election once the heads of all slots. All rows are read only at the start, and when more than one checkpoint was
//! written between two looks.
//!
//! # Assumes
//! What it shows is a little old, and after an election may contain a record that the deposed coordinator
//! acknowledged to nobody, until the new one has written its checkpoint. So it is for status and for finding this
//! node's slot; every decision is the coordinator's.

use crate::area_blocks::{CheckpointHead, CheckpointId};
use crate::block_store::BlockStore;
use crate::damage::read_record;
use crate::election_blocks::CoordinatorEpoch;
use crate::envelope::FormatError;
use crate::metadata::Metadata;
use crate::recovery::{LogError, Recovered, read_failed, replay};
use crate::superblock::Superblock;
use crate::volume_layout::AreaId;

/// The metadata as far as it was followed.
#[derive(Debug)]
pub struct Follower {
    metadata: Metadata,
    base: CheckpointId,
    area: AreaId,
    /// The first journal block that was not applied.
    next: u64,
}

impl From<Recovered> for Follower {
    fn from(recovered: Recovered) -> Self {
        Self {
            metadata: recovered.metadata,
            base: recovered.base,
            area: recovered.area,
            next: recovered.journaled,
        }
    }
}

impl Follower {
    /// The rows.
    #[must_use]
    pub const fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The epoch of the coordinator that wrote the checkpoint.
    #[must_use]
    pub const fn epoch(&self) -> CoordinatorEpoch {
        self.base.epoch
    }

    /// Applies what was written since the last look. `epoch` is that of the newest leader block. None when the
    /// changes cannot be followed: recover then. Also the second value of the tuple, whether a row changed.
    ///
    /// # Errors
    /// [`LogError`]: the volume cannot be read, or is being written at the same time. Recover then.
    pub fn follow<S: BlockStore>(
        mut self,
        store: &mut S,
        superblock: &Superblock,
        epoch: CoordinatorEpoch,
    ) -> Result<Option<(Self, bool)>, LogError> {
        let before = (self.base, self.next);
        let Some((area, head)) = self.newest_head(store, superblock, epoch)? else {
            return Ok(None);
        };
        if head.id != self.base {
            match head.follows {
                Some((base, end)) if base == self.base && self.next <= end => {
                    self.advance(store, superblock, end)?;
                    if self.next < end {
                        return Ok(None);
                    }
                }
                _ => return Ok(None),
            }
            (self.base, self.area, self.next) = (head.id, area, 0);
        }
        self.advance(store, superblock, superblock.area(area).journal_blocks)?;
        let changed = before != (self.base, self.next);
        Ok(Some((self, changed)))
    }

    fn advance<S: BlockStore>(
        &mut self,
        store: &mut S,
        superblock: &Superblock,
        end: u64,
    ) -> Result<(), LogError> {
        let base = (self.area, self.base);
        self.next = replay(store, superblock, base, self.next..end, &mut self.metadata)?;
        Ok(())
    }

    /// The newest head; none if one that may be the newest is damaged.
    fn newest_head<S: BlockStore>(
        &self,
        store: &mut S,
        superblock: &Superblock,
        epoch: CoordinatorEpoch,
    ) -> Result<Option<(AreaId, CheckpointHead)>, LogError> {
        let is_term_of_base = epoch == self.base.epoch;
        let areas = superblock
            .areas()
            .filter(|area| !is_term_of_base || area.slot == self.area.slot);
        let mut newest: Option<(AreaId, CheckpointHead)> = None;
        for area in areas {
            let lba = superblock.area(area).head;
            let head = match read_record::<_, CheckpointHead>(store, superblock, lba)
                .map_err(read_failed)?
            {
                Ok(head) => head,
                Err(FormatError::Blank) => continue,
                Err(_) => return Ok(None),
            };
            if newest.is_none_or(|(_, newest)| newest.id < head.id) {
                newest = Some((area, head));
            }
        }
        Ok(newest)
    }
}
