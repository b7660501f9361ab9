//! Decisions about space: disks and saved states.
//!
//! A new disk's extents hold the data of their last user. Every disk therefore starts as
//! `importing`, bound to the node that fills it. That node writes an image and zeroes the rest, or
//! zeroes the whole disk, and then finishes the import. Until then the disk cannot be opened.

use bascule_types::{
    Answer, Bytes, DiskId, DiskRole, DiskRow, Epoch, Owner, Ownership, Refusal, RowName,
    SavedStateRow, SavedStateSum, VmUid,
};

use super::Metadata;
use super::decide::{Context, Decision};
use super::ownership_changes::{check_not_owned, check_owned};
use crate::broken;
use crate::metadata_records::MetaRecord;

impl Metadata {
    pub(super) fn create_disk(
        &self,
        vm: VmUid,
        name: &RowName,
        size: Bytes,
        role: DiskRole,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        let importer = context.requester.owner;
        if let Some(row) = self.disk_named(name) {
            if row.vm != Some(vm) {
                return Err(Refusal::NameTaken);
            }
            // An imported boot image was cut to the image's length.
            let same_size = row.size == size || (!row.importing && role != DiskRole::Data);
            if !same_size || row.role != role {
                return Err(Refusal::DiskDiffers);
            }
            return self.resume_import(row, importer, context);
        }
        let importer = self.check_importer(importer, context)?;
        self.room_for(1, context)?;
        let extents = self.space.plan(size)?;
        Ok(put(DiskRow {
            disk: context.fresh_disk,
            name: name.clone(),
            vm: Some(vm),
            size,
            role,
            importing: true,
            importer: Some(importer),
            extents,
        }))
    }

    /// The disk exists already: the same importer continues. Another importer takes over only after
    /// the first was fenced or released by its node's reboot.
    fn resume_import(
        &self,
        row: &DiskRow,
        importer: Option<Owner>,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        if !row.importing || (row.importer.is_some() && row.importer == importer) {
            return Ok(Decision::already(Answer::Disk(row.clone())));
        }
        self.check_abandoned(row)?;
        let importer = self.check_importer(importer, context)?;
        Ok(put(DiskRow {
            importer: Some(importer),
            ..row.clone()
        }))
    }

    fn check_importer(
        &self,
        importer: Option<Owner>,
        context: &Context<'_>,
    ) -> Result<Owner, Refusal> {
        let importer = importer.ok_or(Refusal::NotAllowed)?;
        self.check_new_owner(importer, context)?;
        Ok(importer)
    }

    /// Refuses while an importer that is not fenced may still write to the disk.
    fn check_abandoned(&self, row: &DiskRow) -> Result<(), Refusal> {
        match row.importer {
            Some(owner) if self.fence(owner).is_none() => Err(Refusal::ImportedElsewhere { owner }),
            _ => Ok(()),
        }
    }

    pub(super) fn finish_import(
        &self,
        disk: DiskId,
        length: Option<Bytes>,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let row = self.disk(disk).ok_or(Refusal::NoSuchDisk)?;
        if !row.importing {
            return Ok(Decision::already(Answer::Disk(row.clone())));
        }
        match (row.importer, context.requester.owner) {
            (Some(owner), Some(requester)) if owner == requester => {
                self.check_new_owner(owner, context)?
            }
            (Some(owner), _) => return Err(Refusal::ImportedElsewhere { owner }),
            (None, _) => return Err(Refusal::Importing),
        }
        let whole = DiskRow {
            importing: false,
            importer: None,
            ..row.clone()
        };
        match length {
            Some(length) if row.role != DiskRole::Data && length <= row.size => {
                Ok(put(self.cut(whole, length)))
            }
            _ => Ok(put(whole)),
        }
    }

    /// The row with the size `length` and only the extents that `length` needs.
    fn cut(&self, row: DiskRow, length: Bytes) -> DiskRow {
        let extent = self.space.extent_bytes();
        let mut wanted = length.0.next_multiple_of(extent).max(extent);
        let mut extents = row.extents.clone();
        extents.retain_mut(|run| {
            run.length = Bytes(run.length.0.min(wanted));
            wanted -= run.length.0;
            run.length.0 > 0
        });
        DiskRow {
            size: length,
            extents,
            ..row
        }
    }

    pub(super) fn attach_disk(&self, name: &RowName, vm: VmUid) -> Result<Decision, Refusal> {
        let home = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        let row = self.disk_named(name).ok_or(Refusal::NoSuchDisk)?;
        if row.name.namespace() != home.name.namespace() {
            return Err(Refusal::OtherNamespace);
        }
        match row.vm {
            Some(holder) if holder == vm => Ok(Decision::already(Answer::Disk(row.clone()))),
            Some(_) => Err(Refusal::NameTaken),
            None if row.importing => Err(Refusal::Importing),
            None => Ok(put(DiskRow {
                vm: Some(vm),
                ..row.clone()
            })),
        }
    }

    pub(super) fn delete_disk(
        &self,
        disk: DiskId,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        let Some(row) = self.disk(disk) else {
            return Ok(Decision::already(Answer::Gone));
        };
        if let Some(home) = row.vm.and_then(|vm| self.vm(vm)) {
            check_not_owned(home)?;
        }
        if row.importer != context.requester.owner {
            self.check_abandoned(row)?;
        }
        let records = vec![MetaRecord::DeleteDisk(disk)];
        Ok(Decision::new(records, Answer::Gone))
    }

    pub(super) fn reserve_saved(
        &self,
        vm: VmUid,
        from: Ownership,
        size: Bytes,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        self.check_owned_vm(vm, from, context)?;
        let epoch = from.epoch;
        let mut records = Vec::new();
        if let Some(saved) = self.saved(vm) {
            check_not_complete(saved, epoch, context)?;
            if saved.epoch == epoch && room(saved) >= size.0 {
                return Ok(Decision::already(Answer::SavedState(saved.clone())));
            }
            records.push(MetaRecord::DeleteSaved(vm));
        }
        self.room_for(1, context)?;
        let saved = SavedStateRow {
            vm,
            epoch,
            extents: self.space.plan(size)?,
            complete: None,
        };
        records.push(MetaRecord::Saved(saved.clone()));
        Ok(Decision::new(records, Answer::SavedState(saved)))
    }

    pub(super) fn finish_saved(
        &self,
        vm: VmUid,
        from: Ownership,
        sum: SavedStateSum,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        self.check_owned_vm(vm, from, context)?;
        let saved = self.saved(vm).filter(|saved| saved.epoch == from.epoch);
        let saved = saved.ok_or(Refusal::NoSavedState)?;
        if saved.complete == Some(sum) {
            return Ok(Decision::already(Answer::SavedState(saved.clone())));
        }
        if saved.complete.is_some() || sum.length.0 > room(saved) {
            return Err(Refusal::NotAllowed);
        }
        let saved = SavedStateRow {
            complete: Some(sum),
            ..saved.clone()
        };
        let records = vec![MetaRecord::Saved(saved.clone())];
        Ok(Decision::new(records, Answer::SavedState(saved)))
    }

    pub(super) fn drop_saved_state(
        &self,
        vm: VmUid,
        from: Ownership,
        context: &Context<'_>,
    ) -> Result<Decision, Refusal> {
        self.check_owned_vm(vm, from, context)?;
        let Some(saved) = self.saved(vm) else {
            return Ok(Decision::already(Answer::Gone));
        };
        check_not_complete(saved, from.epoch, context)?;
        let records = vec![MetaRecord::DeleteSaved(vm)];
        Ok(Decision::new(records, Answer::Gone))
    }

    fn check_owned_vm(
        &self,
        vm: VmUid,
        from: Ownership,
        context: &Context<'_>,
    ) -> Result<(), Refusal> {
        let row = self.vm(vm).ok_or(Refusal::NoSuchVm)?;
        if broken!(context.rules, SavedStateUnbound) {
            return Ok(());
        }
        check_owned(row, from)?;
        if self.fence(from.owner).is_some() {
            return Err(Refusal::Fenced { owner: from.owner });
        }
        Ok(())
    }

    fn disk_named(&self, name: &RowName) -> Option<&DiskRow> {
        let disk = self.disks_by_name.get(name)?;
        self.disks.get(disk)
    }
}

fn put(row: DiskRow) -> Decision {
    Decision::new(vec![MetaRecord::Disk(row.clone())], Answer::Disk(row))
}

/// An owner that saved the VM completely never runs it again in that epoch, so neither a new reserve nor
/// a drop of the same epoch is meant for the complete state.
fn check_not_complete(
    saved: &SavedStateRow,
    epoch: Epoch,
    context: &Context<'_>,
) -> Result<(), Refusal> {
    let kept = saved.epoch == epoch && !broken!(context.rules, SavedStateUnbound);
    if kept && saved.complete.is_some() {
        Err(Refusal::SavedStateComplete)
    } else {
        Ok(())
    }
}

fn room(saved: &SavedStateRow) -> u64 {
    saved.extents.iter().map(|run| run.length.0).sum()
}
