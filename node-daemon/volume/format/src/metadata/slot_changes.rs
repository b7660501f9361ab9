//! Decisions about heartbeat slots: registration, new generations, fencing confirmations.

use bascule_types::{
    AdminConfirmation, Answer, FenceProof, FenceRow, Generation, NodeUid, Owner, Refusal, SlotId,
    Table, VmRow,
};

use super::decide::{Context, Decision, FENCES_PRUNED};
use super::{Metadata, SlotRow};
use crate::broken;
use crate::metadata_records::MetaRecord;

impl Metadata {
    pub(super) fn register_node(&self, node: NodeUid) -> Result<Decision, Refusal> {
        if let Some(row) = self.slot_of(node) {
            return Ok(Decision::already(slot_answer(row.owner(), Vec::new())));
        }
        self.room_for_reserved()?;
        let free = (0..self.slot_count).map(SlotId);
        let slot = free
            .into_iter()
            .find(|slot| !self.slots.contains_key(slot))
            .ok_or(Refusal::TableFull { what: Table::Slots })?;
        let row = SlotRow {
            slot,
            node,
            generation: Generation(0),
            boot: [0; 16],
        };
        let answer = slot_answer(row.owner(), Vec::new());
        Ok(Decision::new(vec![MetaRecord::Slot(row)], answer))
    }

    /// The requester's heartbeat shows the new generation already; it may own VMs once the rejoin is
    /// durable.
    pub(super) fn rejoin(
        &self,
        node: NodeUid,
        from: Owner,
        rebooted: bool,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let stale = Refusal::StaleOwner { owner: from };
        let to = context.requester.owner.ok_or(stale)?;
        let row = self.slot(from.slot).ok_or(stale)?;
        if row.node != node || context.requester.node != node || to.slot != from.slot {
            return Err(stale);
        }
        if row.generation == to.generation {
            return Ok(Decision::already(slot_answer(to, self.owned_by(to))));
        }
        if row.generation != from.generation || to.generation < from.generation {
            return Err(Refusal::StaleOwner { owner: to });
        }
        self.check_features(to, context)?;
        // The row's boot id overrides `rebooted: false` of the request: no process of a generation of
        // an earlier boot exists any more.
        let rebooted = rebooted || row.boot != context.requester.boot;
        let fenced = self.fence(from).is_some();
        let keep = match fenced {
            true => broken!(context.rules, RejoinKeepsFencedRows),
            false => !rebooted,
        };
        let mut records = vec![MetaRecord::Rejoin {
            from,
            to,
            boot: context.requester.boot,
            keep,
        }];
        // A fence record is deleted only when no row names its victim.
        let done = self.fences.keys().filter(|victim| {
            victim.slot == to.slot && (keep || **victim != from) && !self.is_named(**victim)
        });
        records.extend(
            done.take(FENCES_PRUNED)
                .copied()
                .map(MetaRecord::DeleteFence),
        );
        let kept = if keep {
            self.owned_by(from)
        } else {
            Vec::new()
        };
        Ok(Decision::new(records, slot_answer(to, kept)))
    }

    pub(super) fn confirm_fenced(
        &self,
        victim: Owner,
        confirmation: AdminConfirmation,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        if let Some(fence) = self.fence(victim) {
            return Ok(Decision::already(Answer::Fenced(*fence)));
        }
        let allowed = match confirmation {
            AdminConfirmation::Confirmed => true,
            AdminConfirmation::OutOfServiceTaint => self.policy.out_of_service_taint,
        };
        if !allowed {
            return Err(Refusal::NotAllowed);
        }
        let current = self.slot(victim.slot).map(|row| row.owner());
        if current != Some(victim) {
            return Err(Refusal::StaleOwner { owner: victim });
        }
        context
            .witness
            .lease_over(victim)
            .map_err(|missing| Refusal::NotFenced { victim, missing })?;
        self.room_for_reserved()?;
        let fence = FenceRow {
            victim,
            proof: FenceProof::Administrator(confirmation),
        };
        let answer = Answer::Fenced(fence);
        Ok(Decision::new(vec![MetaRecord::Fence(fence)], answer))
    }

    /// Refuses a new owner that is not its slot's present generation, is fenced, or has no valid lease.
    pub(super) fn check_new_owner(
        &self,
        owner: Owner,
        context: &Context<'_>,
    ) -> Result<(), Refusal> {
        if self.slot(owner.slot).map(SlotRow::owner) != Some(owner) {
            return Err(Refusal::StaleOwner { owner });
        }
        if self.fence(owner).is_some() {
            return Err(Refusal::Fenced { owner });
        }
        if !context.witness.lease_valid(owner) {
            return Err(Refusal::LeaseInvalid { owner });
        }
        Ok(())
    }

    fn owned_by(&self, owner: Owner) -> Vec<bascule_types::VmUid> {
        let rows = self.vms.values().filter(|row| row.owner == Some(owner));
        rows.map(|row: &VmRow| row.vm).collect()
    }

    fn is_named(&self, owner: Owner) -> bool {
        self.holders.contains_key(&owner)
    }
}

fn slot_answer(owner: Owner, kept: Vec<bascule_types::VmUid>) -> Answer {
    Answer::Slot { owner, kept }
}
