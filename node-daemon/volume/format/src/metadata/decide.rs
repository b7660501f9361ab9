//! A change, decided: which records it takes, or why it is refused. Pure; alters nothing.

use bascule_types::{
    Answer, Change, DiskId, FenceProof, MissingProof, NodeUid, Owner, Ownership, Refusal,
};

use super::Metadata;
use crate::metadata_records::MetaRecord;

/// What the coordinator knows beyond the rows, all of it from its own reads of the volume.
pub trait Witness {
    /// Whether the heartbeat of exactly this (slot, generation) was seen to rise recently enough
    /// for its lease to be valid.
    fn lease_valid(&self, owner: Owner) -> bool;

    /// Whether this (slot, generation) is certain not to write any more, by the times of its own
    /// heartbeat record and the kind of its watchdog. Knows nothing of fence rows.
    ///
    /// # Errors
    /// What is missing.
    fn proof(&self, victim: Owner) -> Result<FenceProof, MissingProof>;
}

/// Who asks: the node whose `bascule-volume` sent the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requester {
    /// The node.
    pub node: NodeUid,
    /// The slot and generation in its heartbeat; none before it has a slot.
    pub owner: Option<Owner>,
    /// Its kernel's boot id.
    pub boot: [u8; 16],
}

/// What a decision needs beyond the rows.
#[expect(
    missing_debug_implementations,
    reason = "holds a borrowed trait object"
)]
pub struct Context<'a> {
    /// Who asks.
    pub requester: Requester,
    /// What the coordinator saw on the volume.
    pub witness: &'a dyn Witness,
    /// The identity of a disk, should one be created.
    pub fresh_disk: DiskId,
}

/// A granted change: the records to make durable, all or none, and then the answer. No records
/// means that it was granted before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What to journal.
    pub records: Vec<MetaRecord>,
    /// What to answer when that is durable.
    pub answer: Answer,
}

impl Decision {
    pub(super) fn already(answer: Answer) -> Self {
        Self {
            records: Vec::new(),
            answer,
        }
    }

    pub(super) fn new(records: Vec<MetaRecord>, answer: Answer) -> Self {
        Self { records, answer }
    }
}

impl Metadata {
    /// Decides a change.
    ///
    /// # Errors
    /// [`Refusal`]; nothing was altered.
    pub fn decide(&self, change: &Change, context: &Context<'_>) -> Result<Decision, Refusal> {
        match change {
            Change::RegisterNode { node } => self.register_node(*node),
            Change::Rejoin {
                node,
                from,
                rebooted,
            } => self.rejoin(*node, *from, *rebooted, context),
            Change::ConfirmFenced {
                victim,
                confirmation,
            } => self.confirm_fenced(*victim, *confirmation, context),
            Change::CreateVm {
                vm,
                name,
                spec_digest,
            } => self.create_vm(*vm, name, *spec_digest),
            Change::DeleteVm { vm } => self.delete_vm(*vm),
            Change::Acquire {
                vm,
                expected_epoch,
                to,
            } => self.acquire(*vm, *expected_epoch, *to, context),
            Change::Release { vm, from, epoch } => {
                self.release(*vm, Ownership::new(*from, *epoch), context)
            }
            Change::Transfer {
                vm,
                from,
                epoch,
                to,
                attempt,
            } => self.transfer(*vm, Ownership::new(*from, *epoch), *to, *attempt, context),
            Change::TakeOver {
                vm,
                from,
                epoch,
                to,
            } => self.take_over(*vm, Ownership::new(*from, *epoch), *to, context),
            _ => self.decide_storage(change, context),
        }
    }

    fn decide_storage(&self, change: &Change, context: &Context<'_>) -> Result<Decision, Refusal> {
        match change {
            Change::CreateDisk {
                vm,
                name,
                size,
                role,
                ..
            } => self.create_disk(*vm, name, *size, *role, context),
            Change::FinishImport { disk, length } => self.finish_import(*disk, *length, context),
            Change::AttachDisk { name, vm } => self.attach_disk(name, *vm),
            Change::DeleteDisk { disk } => self.delete_disk(*disk, context),
            Change::ReserveSavedState { vm, from, size } => self.reserve_saved(*vm, *from, *size),
            Change::FinishSavedState {
                vm,
                from,
                length,
                crc32c,
            } => self.finish_saved(*vm, *from, *length, *crc32c),
            Change::DropSavedState { vm, from } => self.drop_saved_state(*vm, *from),
            _ => Err(Refusal::NotAllowed),
        }
    }
}
