//! Decisions about the ownership of VMs.

use bascule_types::{
    Answer, AttemptId, Epoch, FenceRow, Owner, Ownership, Refusal, RowName, VmRow, VmUid,
};

use super::Metadata;
use super::decide::{Context, Decision};
use crate::broken;
use crate::metadata_records::MetaRecord;

impl Metadata {
    pub(super) fn create_vm(
        &self,
        vm: VmUid,
        name: &RowName,
        spec_digest: [u8; 32],
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        if let Some(row) = self.vm(vm) {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        self.room_for(1, context)?;
        Ok(put(VmRow {
            vm,
            name: name.clone(),
            owner: None,
            epoch: Epoch(0),
            attempt: None,
            spec_digest,
        }))
    }

    pub(super) fn delete_vm(&self, vm: VmUid) -> Result<Decision, Refusal> {
        let Some(row) = self.vm(vm) else {
            return Ok(Decision::already(Answer::Gone));
        };
        check_not_owned(row)?;
        let records = vec![MetaRecord::DeleteVm(vm)];
        Ok(Decision::new(records, Answer::Gone))
    }

    pub(super) fn acquire(
        &self,
        vm: VmUid,
        expected: Epoch,
        to: Owner,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        let granted = row.owner == Some(to) && row.attempt.is_none();
        if granted && row.epoch.follows(expected) {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        check_not_owned(row)?;
        if row.epoch != expected {
            return Err(Refusal::EpochIs { epoch: row.epoch });
        }
        self.check_new_owner(to, context)?;
        Ok(put(next_ownership(row, to, None)))
    }

    pub(super) fn release(
        &self,
        vm: VmUid,
        from: Ownership,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        if row.owner.is_none() && row.epoch == from.epoch {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        check_owned(row, from)?;
        self.check_requester(from.owner, context)?;
        Ok(put(VmRow {
            owner: None,
            ..row.clone()
        }))
    }

    /// The commit point of a migration. A repeated request is recognised by its attempt, whichever
    /// owner the row has in that epoch by now: the destination may have rejoined or released it.
    pub(super) fn transfer(
        &self,
        vm: VmUid,
        from: Ownership,
        to: Owner,
        attempt: AttemptId,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        if row.attempt == Some(attempt) && row.epoch.follows(from.epoch) {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        check_owned(row, from)?;
        if self.fence(from.owner).is_some() {
            return Err(Refusal::Fenced { owner: from.owner });
        }
        self.check_requester(from.owner, context)?;
        self.check_new_owner(to, context)?;
        Ok(put(next_ownership(row, to, Some(attempt))))
    }

    pub(super) fn take_over(
        &self,
        vm: VmUid,
        from: Ownership,
        to: Owner,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        let granted = row.owner == Some(to) && row.attempt.is_none();
        if granted && row.epoch.follows(from.epoch) && to != from.owner {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        check_owned(row, from)?;
        self.check_new_owner(to, context)?;
        let mut records = Vec::new();
        let victim = from.owner;
        if self.fence(victim).is_none() {
            let proof = context
                .witness
                .proof(victim)
                .map_err(|missing| Refusal::NotFenced { victim, missing })?;
            self.room_for_reserved()?;
            records.push(MetaRecord::Fence(FenceRow { victim, proof }));
        }
        let half_saved = self.saved(vm).filter(|saved| saved.complete.is_none());
        records.extend(half_saved.map(|saved| MetaRecord::DeleteSaved(saved.vm)));
        let mut next = next_ownership(row, to, None);
        if broken!(context.rules, TakeOverKeepsEpoch) {
            next.epoch = row.epoch;
        }
        records.push(MetaRecord::Vm(next.clone()));
        Ok(Decision::new(records, Answer::Row(next)))
    }

    /// Refuses a requester that is not on the owner's node: only that node knows whether the guest is
    /// stopped and its writes have completed.
    fn check_requester(&self, owner: Owner, context: &Context<'_>) -> Result<(), Refusal> {
        let holder = self.slot(owner.slot).map(|row| row.node);
        if holder == Some(context.requester.node) {
            Ok(())
        } else {
            Err(Refusal::OwnersNodeOnly { owner })
        }
    }
}

/// The row in its next epoch, owned by `to`.
fn next_ownership(row: &VmRow, to: Owner, attempt: Option<AttemptId>) -> VmRow {
    VmRow {
        owner: Some(to),
        epoch: row.epoch.next(),
        attempt,
        ..row.clone()
    }
}

fn put(row: VmRow) -> Decision {
    Decision::new(vec![MetaRecord::Vm(row.clone())], Answer::Row(row))
}

pub(super) fn check_not_owned(row: &VmRow) -> Result<(), Refusal> {
    match row.owner {
        None => Ok(()),
        Some(owner) => Err(Refusal::OwnedBy {
            owner,
            epoch: row.epoch,
        }),
    }
}

pub(super) fn check_owned(row: &VmRow, by: Ownership) -> Result<(), Refusal> {
    match row.owner {
        Some(owner) if Ownership::new(owner, row.epoch) == by => Ok(()),
        Some(owner) => Err(Refusal::OwnedBy {
            owner,
            epoch: row.epoch,
        }),
        None => Err(Refusal::EpochIs { epoch: row.epoch }),
    }
}
