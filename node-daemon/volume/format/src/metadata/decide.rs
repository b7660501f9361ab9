//! The decision about a change: the records that implement it, or the reason of its refusal. Pure:
//! changes no row.

use bascule_types::{
    Answer, Change, DiskId, FenceProof, MissingProof, NodeUid, Owner, Ownership, Refusal,
    SavedStateSum, SlotId,
};

use super::Metadata;
use crate::features::Features;
use crate::metadata_records::MetaRecord;
use crate::rules::Rules;

/// The coordinator's evidence about other nodes, all of it from its own reads of the volume.
pub trait Witness {
    /// Whether the heartbeat of this slot and generation was seen to rise within the watch time W.
    fn lease_valid(&self, owner: Owner) -> bool;

    /// Whether the lease of `victim` has certainly ended: this node's own reads showed no new heartbeat
    /// for the watch time W. More than the absence of [`Witness::lease_valid`]: a node that could not
    /// read for a while has seen nothing rise, and knows nothing.
    ///
    /// # Errors
    /// What is missing for that.
    fn lease_over(&self, victim: Owner) -> Result<(), MissingProof>;

    /// The proof that `victim` will not write again, by the times and the watchdog kind of its own
    /// heartbeat record. Does not consider fence records.
    ///
    /// # Errors
    /// What is missing for a proof.
    fn proof(&self, victim: Owner) -> Result<FenceProof, MissingProof>;

    /// Who wrote the newest heartbeat record of the slot that was read, and the features that it has; none if none
    /// was read.
    fn newest_record(&self, slot: SlotId) -> Option<(Owner, Features)>;
}

/// The node whose `bascule-volume` sent the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requester {
    /// The node's UID.
    pub node: NodeUid,
    /// The slot and generation in the node's newest heartbeat; none before it has a slot.
    pub owner: Option<Owner>,
    /// The boot id of the node's kernel.
    pub boot: [u8; 16],
}

/// What a decision needs beyond the rows.
#[expect(
    missing_debug_implementations,
    reason = "holds a borrowed trait object"
)]
pub struct Context<'a> {
    /// The node that sent the change.
    pub requester: Requester,
    /// The coordinator's evidence about other nodes.
    pub witness: &'a dyn Witness,
    /// The identity for a disk that the change creates.
    pub fresh_disk: DiskId,
    /// All of them; tests break one at a time.
    pub rules: Rules,
}

/// A granted change: the records to make durable as one group, and then the answer. No records:
/// the change was granted before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The group to journal.
    pub records: Vec<MetaRecord>,
    /// The answer to send once the group is durable.
    pub answer: Answer,
}

/// The most records of one decision: a rejoin's, which deletes fences too.
pub const DECISION_MAX: usize = 1 + FENCES_PRUNED;
/// Fence records that one rejoin deletes at most (a guess); the next one deletes more.
pub(super) const FENCES_PRUNED: usize = 4;

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
    /// [`Refusal`]; no row changes then.
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
            } => self.create_vm(*vm, name, *spec_digest, context),
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
            Change::ReserveSavedState {
                vm,
                from,
                epoch,
                size,
            } => self.reserve_saved(*vm, Ownership::new(*from, *epoch), *size, context),
            Change::FinishSavedState {
                vm,
                from,
                epoch,
                length,
                crc32c,
            } => {
                let sum = SavedStateSum {
                    length: *length,
                    crc32c: *crc32c,
                };
                self.finish_saved(*vm, Ownership::new(*from, *epoch), sum, context)
            }
            Change::DropSavedState { vm, from, epoch } => {
                self.drop_saved_state(*vm, Ownership::new(*from, *epoch), context)
            }
            _ => Err(Refusal::NotAllowed),
        }
    }
}
