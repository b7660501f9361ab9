//! What must hold of election blocks as they land, and of rows as they are answered.

use std::collections::BTreeMap;

use bascule_ipc::volume::Rows;
use bascule_types::{Epoch, Lba, Owner, SlotId, VmRow, VmUid};
use bascule_volume_format::{LeaderBlock, PaxosBlock, SlotPart, Superblock, open};

/// The election blocks: one coordinator of an epoch, and no block goes back to what it said before.
#[derive(Debug, Default)]
pub(crate) struct ElectionOracle {
    leaders: BTreeMap<u64, Owner>,
}

impl ElectionOracle {
    pub(crate) fn landed(
        &mut self,
        superblock: &Superblock,
        lba: Lba,
        before: Option<&[u8]>,
        block: &[u8],
    ) {
        let place = superblock.place(lba);
        match superblock.slot_part(lba) {
            Some((_, SlotPart::Leader)) => {
                let Ok(leader) = open::<LeaderBlock>(block, place) else {
                    return;
                };
                let earlier = before.and_then(|before| open::<LeaderBlock>(before, place).ok());
                assert!(
                    earlier.is_none_or(|earlier| earlier.epoch <= leader.epoch),
                    "I6: the leader block {leader:?} took the place of {earlier:?}"
                );
                let first = *(self.leaders.entry(leader.epoch.0)).or_insert(leader.coordinator);
                assert_eq!(
                    first.slot, leader.coordinator.slot,
                    "I6: two coordinators of epoch {}",
                    leader.epoch
                );
            }
            Some((_, SlotPart::Paxos(_))) => {
                let said = |block| {
                    let block: PaxosBlock = open(block, place).ok()?;
                    Some((block.mbal, block.accepted.map(|accepted| accepted.bal)))
                };
                let (earlier, now) = (before.and_then(said), said(block));
                assert!(
                    now.is_none() || earlier <= now,
                    "I6: the Paxos block {now:?} took the place of {earlier:?}"
                );
            }
            _ => {}
        }
    }
}

/// The rows, as one client sees them one after the other.
#[derive(Debug, Default)]
pub(crate) struct RowOracle {
    granted: BTreeMap<VmUid, Epoch>,
    owners: BTreeMap<(VmUid, Epoch), SlotId>,
    fenced: BTreeMap<(VmUid, Epoch), Owner>,
}

impl RowOracle {
    /// A change was answered with this row.
    pub(crate) fn granted(&mut self, row: &VmRow) {
        let known = self.granted.entry(row.vm).or_default();
        *known = row.epoch.max(*known);
        self.owned(row);
    }

    /// An answer to a request that was sent after every earlier answer had come.
    pub(crate) fn seen(&mut self, rows: &Rows) {
        for row in &rows.vms {
            let granted = self.granted.get(&row.vm).copied().unwrap_or_default();
            assert!(
                row.epoch >= granted,
                "I3: {row:?} is shown after epoch {granted} was granted"
            );
            self.owned(row);
            let Some(owner) = row.owner else { continue };
            let key = (row.vm, row.epoch);
            if rows.fences.iter().any(|fence| fence.victim == owner) {
                self.fenced.insert(key, owner);
            }
            let fenced = self.fenced.get(&key).copied().unwrap_or(owner);
            assert!(
                fenced == owner,
                "I2: {row:?} was owned by {fenced}, which was fenced, in the same epoch"
            );
        }
    }

    fn owned(&mut self, row: &VmRow) {
        let Some(owner) = row.owner else { return };
        let first = *(self.owners.entry((row.vm, row.epoch))).or_insert(owner.slot);
        assert_eq!(first, owner.slot, "I2: two owners in one epoch: {row:?}");
    }
}
