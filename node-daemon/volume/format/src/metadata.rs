//! The metadata in memory: every row, the effect of each record on the rows, and the decisions about
//! requested changes.
//!
//! Only [`Metadata::apply`] changes rows. Its records come from a checkpoint, from the journal, or
//! from [`Metadata::decide`] after they were made durable.

mod decide;
mod disk_changes;
mod feature_changes;
mod ownership_changes;
mod slot_changes;

use std::collections::{BTreeMap, BTreeSet};

use bascule_types::{
    Bytes, DiskId, DiskRow, ExtentRun, FenceRow, NodeUid, Owner, Refusal, RowName, SavedStateRow,
    SlotId, VmRow, VmUid,
};

use crate::broken;
use crate::extent_allocator::ExtentAllocator;
use crate::features::Features;
use crate::metadata_records::{MetaRecord, SlotRow};
use crate::superblock::{Fencing, FencingPolicy, Superblock};

pub use decide::{Context, DECISION_MAX, Decision, Requester, Witness};

/// Every row of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    fencing: Fencing,
    policy: FencingPolicy,
    slot_count: u16,
    rows_max: u64,
    slots: BTreeMap<SlotId, SlotRow>,
    vms: BTreeMap<VmUid, VmRow>,
    disks: BTreeMap<DiskId, DiskRow>,
    disks_by_name: BTreeMap<RowName, DiskId>,
    saved: BTreeMap<VmUid, SavedStateRow>,
    fences: BTreeMap<Owner, FenceRow>,
    features: Features,
    space: ExtentAllocator,
    /// How many VMs each owner owns, and disks it imports. Follows from the rows.
    holders: BTreeMap<Owner, u64>,
}

/// What a node shows of the metadata and decides by, whatever the number of VMs and disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overview {
    /// The slots that nodes have registered, in ascending order.
    pub slots: Vec<SlotRow>,
    /// The owners with a fence record.
    pub fenced: BTreeSet<Owner>,
    /// The owners of VMs, and the importers of disks.
    pub holders: BTreeSet<Owner>,
    /// The size of the extent region.
    pub capacity: Bytes,
    /// The free part of it.
    pub free: Bytes,
    /// The features that were raised.
    pub features: Features,
}

/// A record cannot be applied to the present rows: the metadata is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// The extents are allocated to another row, or lie outside the extent region.
    #[error("two disks or saved states claim the same extents, or extents outside of the volume")]
    Extents,
    /// The record changes or deletes a row that does not exist.
    #[error("a record changes or deletes an object that does not exist")]
    Missing,
    /// Two disks of one name.
    #[error("two disks have the same name")]
    Name,
    /// The slot number is not below the volume's slot count.
    #[error("a record names a slot that the volume does not have")]
    Slot,
}

impl Metadata {
    /// The metadata of a volume without rows.
    #[must_use]
    pub fn new(superblock: &Superblock) -> Self {
        let area = superblock.area(crate::volume_layout::AreaId {
            slot: SlotId(0),
            half: 0,
        });
        Self {
            fencing: superblock.fencing,
            policy: superblock.policy,
            slot_count: superblock.slot_count,
            rows_max: area.rows_max(),
            slots: BTreeMap::new(),
            vms: BTreeMap::new(),
            disks: BTreeMap::new(),
            disks_by_name: BTreeMap::new(),
            saved: BTreeMap::new(),
            fences: BTreeMap::new(),
            features: Features::NONE,
            space: ExtentAllocator::new(superblock),
            holders: BTreeMap::new(),
        }
    }

    /// The overview of these rows.
    #[must_use]
    pub fn overview(&self) -> Overview {
        Overview {
            slots: self.slots.values().copied().collect(),
            fenced: self.fences.keys().copied().collect(),
            holders: self.holders.keys().copied().collect(),
            capacity: self.capacity(),
            free: self.free(),
            features: self.features,
        }
    }

    /// Applies a record to the rows.
    ///
    /// # Errors
    /// [`Contradiction`]. The record may be half applied: discard this value then.
    pub fn apply(&mut self, record: &MetaRecord) -> Result<(), Contradiction> {
        match record {
            MetaRecord::Slot(row) => self.apply_slot(*row)?,
            MetaRecord::Vm(row) => {
                self.hold(row.owner);
                let before = self.vms.insert(row.vm, row.clone());
                self.let_go(before.and_then(|row| row.owner));
            }
            MetaRecord::Disk(row) => self.apply_disk(row)?,
            MetaRecord::Saved(row) => {
                self.drop_saved(row.vm);
                self.take(&row.extents)?;
                self.saved.insert(row.vm, row.clone());
            }
            MetaRecord::Fence(row) => {
                self.fences.insert(row.victim, *row);
            }
            MetaRecord::Rejoin {
                from,
                to,
                boot,
                keep,
            } => self.apply_rejoin(*from, *to, *boot, *keep)?,
            MetaRecord::DeleteVm(vm) => self.apply_delete_vm(*vm)?,
            MetaRecord::DeleteDisk(disk) => self.drop_disk(*disk)?,
            MetaRecord::DeleteSaved(vm) => self.drop_saved(*vm),
            MetaRecord::DeleteFence(victim) => {
                self.fences.remove(victim);
            }
            MetaRecord::Features(more) => self.features = self.features.with(*more),
        }
        Ok(())
    }

    /// The records of a checkpoint: applied to empty metadata they rebuild these rows. The order is
    /// fixed: features if there are any, slots, VMs, disks, saved states, fences.
    pub fn rows(&self) -> impl Iterator<Item = MetaRecord> + '_ {
        let features = (!self.features.is_empty()).then_some(MetaRecord::Features(self.features));
        let slots = self.slots.values().copied().map(MetaRecord::Slot);
        let vms = self.vms.values().cloned().map(MetaRecord::Vm);
        let disks = self.disks.values().cloned().map(MetaRecord::Disk);
        let saved = self.saved.values().cloned().map(MetaRecord::Saved);
        let fences = self.fences.values().copied().map(MetaRecord::Fence);
        let features = features.into_iter().chain(slots);
        features.chain(vms).chain(disks).chain(saved).chain(fences)
    }

    /// The number of all rows, which a checkpoint must have room for.
    #[must_use]
    pub fn row_count(&self) -> u64 {
        let rows = self.slots.len()
            + self.vms.len()
            + self.disks.len()
            + self.saved.len()
            + self.fences.len()
            + usize::from(!self.features.is_empty());
        rows as u64
    }

    /// The slots that nodes have registered, in ascending order.
    pub fn slots(&self) -> impl Iterator<Item = &SlotRow> {
        self.slots.values()
    }

    /// The slot that is assigned to `node`.
    #[must_use]
    pub fn slot_of(&self, node: NodeUid) -> Option<&SlotRow> {
        self.slots.values().find(|row| row.node == node)
    }

    /// The row of `slot`; none if no node holds it.
    #[must_use]
    pub fn slot(&self, slot: SlotId) -> Option<&SlotRow> {
        self.slots.get(&slot)
    }

    /// The row of `vm`.
    #[must_use]
    pub fn vm(&self, vm: VmUid) -> Option<&VmRow> {
        self.vms.get(&vm)
    }

    /// All VMs.
    pub fn vms(&self) -> impl Iterator<Item = &VmRow> {
        self.vms.values()
    }

    /// The row of `disk`.
    #[must_use]
    pub fn disk(&self, disk: DiskId) -> Option<&DiskRow> {
        self.disks.get(&disk)
    }

    /// All disks, kept ones too.
    pub fn disks(&self) -> impl Iterator<Item = &DiskRow> {
        self.disks.values()
    }

    /// The disks of `vm`.
    pub fn disks_of(&self, vm: VmUid) -> impl Iterator<Item = &DiskRow> {
        self.disks().filter(move |row| row.vm == Some(vm))
    }

    /// All saved states.
    pub fn saved_states(&self) -> impl Iterator<Item = &SavedStateRow> {
        self.saved.values()
    }

    /// The saved state of `vm`.
    #[must_use]
    pub fn saved(&self, vm: VmUid) -> Option<&SavedStateRow> {
        self.saved.get(&vm)
    }

    /// All fence records.
    pub fn fences(&self) -> impl Iterator<Item = &FenceRow> {
        self.fences.values()
    }

    /// The fence record of `victim`, if it was fenced.
    #[must_use]
    pub fn fence(&self, victim: Owner) -> Option<&FenceRow> {
        self.fences.get(&victim)
    }

    /// The features that were raised.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The size of the extent region in bytes.
    #[must_use]
    pub fn capacity(&self) -> Bytes {
        self.space.capacity()
    }

    /// The free part of the extent region in bytes.
    #[must_use]
    pub fn free(&self) -> Bytes {
        self.space.free_bytes()
    }

    fn apply_slot(&mut self, row: SlotRow) -> Result<(), Contradiction> {
        if row.slot.0 >= self.slot_count {
            return Err(Contradiction::Slot);
        }
        self.slots.insert(row.slot, row);
        Ok(())
    }

    fn apply_disk(&mut self, row: &DiskRow) -> Result<(), Contradiction> {
        if self.disks.contains_key(&row.disk) {
            self.drop_disk(row.disk)?;
        }
        if self.disks_by_name.contains_key(&row.name) {
            return Err(Contradiction::Name);
        }
        self.take(&row.extents)?;
        self.hold(row.importer);
        self.disks_by_name.insert(row.name.clone(), row.disk);
        self.disks.insert(row.disk, row.clone());
        Ok(())
    }

    fn apply_rejoin(
        &mut self,
        from: Owner,
        to: Owner,
        boot: [u8; 16],
        keep: bool,
    ) -> Result<(), Contradiction> {
        let slot = self.slots.get_mut(&to.slot).ok_or(Contradiction::Missing)?;
        slot.generation = to.generation;
        slot.boot = boot;
        let heir = keep.then_some(to);
        if let Some(count) = self.holders.remove(&from)
            && let Some(heir) = heir
        {
            *self.holders.entry(heir).or_default() += count;
        }
        for vm in self.vms.values_mut() {
            if vm.owner == Some(from) {
                vm.owner = heir;
            }
        }
        for disk in self.disks.values_mut() {
            if disk.importer == Some(from) {
                disk.importer = heir;
            }
        }
        Ok(())
    }

    fn apply_delete_vm(&mut self, vm: VmUid) -> Result<(), Contradiction> {
        let row = self.vms.remove(&vm).ok_or(Contradiction::Missing)?;
        self.let_go(row.owner);
        self.drop_saved(vm);
        for disk in self.disks.values_mut() {
            if disk.vm == Some(vm) {
                disk.vm = None;
            }
        }
        Ok(())
    }

    fn drop_disk(&mut self, disk: DiskId) -> Result<(), Contradiction> {
        let row = self.disks.remove(&disk).ok_or(Contradiction::Missing)?;
        self.let_go(row.importer);
        self.disks_by_name.remove(&row.name);
        self.space.give(&row.extents);
        Ok(())
    }

    fn drop_saved(&mut self, vm: VmUid) {
        if let Some(row) = self.saved.remove(&vm) {
            self.space.give(&row.extents);
        }
    }

    fn hold(&mut self, owner: Option<Owner>) {
        if let Some(owner) = owner {
            *self.holders.entry(owner).or_default() += 1;
        }
    }

    fn let_go(&mut self, owner: Option<Owner>) {
        if let Some(owner) = owner
            && let Some(count) = self.holders.get_mut(&owner)
        {
            *count -= 1;
            if *count == 0 {
                self.holders.remove(&owner);
            }
        }
    }

    fn take(&mut self, extents: &[ExtentRun]) -> Result<(), Contradiction> {
        if self.space.take(extents) {
            Ok(())
        } else {
            Err(Contradiction::Extents)
        }
    }

    /// Refuses a row that only a user's wish needs, if it would take room that is kept for
    /// [`Metadata::room_for_reserved`].
    fn room_for(&self, rows: u64, context: &Context<'_>) -> Result<(), Refusal> {
        if broken!(context.rules, NoReservedRows) {
            return self.has_room(rows);
        }
        let kept = self.slots.len() + self.fences.len() + usize::from(!self.features.is_empty());
        let reserved = u64::from(self.slot_count) * RESERVED_PER_SLOT + RESERVED_FOR_FEATURES;
        self.has_room(rows + reserved.saturating_sub(kept as u64))
    }

    /// Refuses a slot, a fence or the features only if not even a checkpoint would have room. A full table must not
    /// keep a node from joining, or a VM from being taken over.
    fn room_for_reserved(&self) -> Result<(), Refusal> {
        self.has_room(1)
    }

    fn has_room(&self, rows: u64) -> Result<(), Refusal> {
        if self.row_count() + rows > self.rows_max {
            let what = bascule_types::Table::Rows;
            return Err(Refusal::TableFull { what });
        }
        Ok(())
    }
}

/// A slot's own row, the fence of its present generation and the one of the generation before, which
/// the next rejoin deletes. Only a present generation is fenced, because no row names an older one.
const RESERVED_PER_SLOT: u64 = 3;
/// All features together are one row.
const RESERVED_FOR_FEATURES: u64 = 1;
