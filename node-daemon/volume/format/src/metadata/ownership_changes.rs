//! Decisions about who may run a VM.

use bascule_types::{AttemptId, Epoch, Owner, VmUid};

use super::Metadata;
use super::decide::{Context, Decision};
use crate::record::MetaRecord;
use bascule_types::{Answer, FenceRow, Refusal, RowName, VmRow};

impl Metadata {
    pub(super) fn create_vm(
        &self,
        vm: VmUid,
        name: &RowName,
        spec_digest: [u8; 32],
    ) -> Result<Decision, Refusal> {
        if let Some(row) = self.vm(vm) {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        self.room_for(1)?;
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
        not_owned(row)?;
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
        if granted && row.epoch == expected.next() {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        not_owned(row)?;
        if row.epoch != expected {
            return Err(Refusal::EpochIs { epoch: row.epoch });
        }
        self.check_new_owner(to, context)?;
        Ok(put(tenure(row, to, None)))
    }

    pub(super) fn release(
        &self,
        vm: VmUid,
        from: Owner,
        epoch: Epoch,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        if row.owner.is_none() && row.epoch == epoch {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        owned(row, from, epoch)?;
        self.check_asker(from, context)?;
        Ok(put(VmRow {
            owner: None,
            ..row.clone()
        }))
    }

    /// The commit point of a migration. That it happened is known by the attempt, whoever owns the
    /// row in that epoch by now: the destination may have re-joined or released since.
    pub(super) fn transfer(
        &self,
        vm: VmUid,
        (from, epoch): (Owner, Epoch),
        to: Owner,
        attempt: AttemptId,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        if row.attempt == Some(attempt) && row.epoch == epoch.next() {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        owned(row, from, epoch)?;
        if self.fence(from).is_some() {
            return Err(Refusal::Fenced { owner: from });
        }
        self.check_asker(from, context)?;
        self.check_new_owner(to, context)?;
        Ok(put(tenure(row, to, Some(attempt))))
    }

    pub(super) fn take_over(
        &self,
        vm: VmUid,
        (from, epoch): (Owner, Epoch),
        to: Owner,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        let granted = row.owner == Some(to) && row.attempt.is_none();
        if granted && row.epoch == epoch.next() && to != from {
            return Ok(Decision::already(Answer::Row(row.clone())));
        }
        owned(row, from, epoch)?;
        self.check_new_owner(to, context)?;
        let mut records = Vec::new();
        if self.fence(from).is_none() {
            let victim = from;
            let proof = context
                .witness
                .proof(victim)
                .map_err(|missing| Refusal::NotFenced { victim, missing })?;
            self.room_for(1)?;
            records.push(MetaRecord::Fence(FenceRow { victim, proof }));
        }
        let half_saved = self.saved(vm).filter(|saved| saved.complete.is_none());
        records.extend(half_saved.map(|saved| MetaRecord::DeleteSaved(saved.vm)));
        let row = tenure(row, to, None);
        records.push(MetaRecord::Vm(row.clone()));
        Ok(Decision::new(records, Answer::Row(row)))
    }

    /// Only the owner's node knows whether its guest is stopped and its writes have completed.
    fn check_asker(&self, owner: Owner, context: &Context<'_>) -> Result<(), Refusal> {
        let holder = self.slot(owner.slot).map(|row| row.node);
        if holder == Some(context.asker.node) {
            Ok(())
        } else {
            Err(Refusal::OwnersNodeOnly { owner })
        }
    }
}

/// The row in its next tenure.
fn tenure(row: &VmRow, to: Owner, attempt: Option<AttemptId>) -> VmRow {
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

pub(super) fn not_owned(row: &VmRow) -> Result<(), Refusal> {
    match row.owner {
        None => Ok(()),
        Some(owner) => Err(Refusal::OwnedBy {
            owner,
            epoch: row.epoch,
        }),
    }
}

pub(super) fn owned(row: &VmRow, from: Owner, epoch: Epoch) -> Result<(), Refusal> {
    match row.owner {
        Some(owner) if owner == from && row.epoch == epoch => Ok(()),
        Some(owner) => Err(Refusal::OwnedBy {
            owner,
            epoch: row.epoch,
        }),
        None => Err(Refusal::EpochIs { epoch: row.epoch }),
    }
}
