//! The real metadata with one VM, as the coordinator of a model holds it.

use std::hash::{Hash, Hasher};

use bascule_types::{
    Answer, AttemptId, Change, ClusterId, DiskId, Epoch, FenceProof, Generation, MissingProof,
    NodeUid, Owner, Refusal, RowName, SlotId, VmUid, VolumeId,
};
use bascule_volume_format::{
    Context, Features, Fencing, FencingPolicy, FormatRequest, MetaRecord, Metadata, Requester,
    Timings, Witness,
};
use bascule_volume_protocol::{Mutation, Rules};

pub(crate) const VM: VmUid = VmUid::from_bytes([7; 16]);

/// The evidence of a model's coordinator.
pub(crate) struct TestWitness<L, P, O = fn(Owner) -> Result<(), MissingProof>> {
    pub(crate) alive: L,
    pub(crate) over: O,
    pub(crate) proof: P,
}

impl<L, P, O> Witness for TestWitness<L, P, O>
where
    L: Fn(Owner) -> bool,
    O: Fn(Owner) -> Result<(), MissingProof>,
    P: Fn(Owner) -> Result<FenceProof, MissingProof>,
{
    fn lease_valid(&self, owner: Owner) -> bool {
        (self.alive)(owner)
    }

    fn lease_over(&self, victim: Owner) -> Result<(), MissingProof> {
        (self.over)(victim)
    }

    fn proof(&self, victim: Owner) -> Result<FenceProof, MissingProof> {
        (self.proof)(victim)
    }

    fn newest_record(&self, _: SlotId) -> Option<(Owner, Features)> {
        None
    }
}

/// The metadata, hashed by the parts that a model changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table(Metadata);

impl Hash for Table {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let row = self.0.vm(VM).map(|row| (row.owner, row.epoch, row.attempt));
        row.hash(hasher);
        for slot in self.0.slots() {
            slot.hash(hasher);
        }
        for fence in self.0.fences() {
            fence.victim.hash(hasher);
        }
    }
}

/// The VM's row: its owner, its epoch, and the migration attempt that began the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Row {
    pub(crate) owner: Option<Owner>,
    pub(crate) epoch: Epoch,
    pub(crate) attempt: Option<AttemptId>,
}

pub(crate) fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

fn node(slot: SlotId) -> NodeUid {
    NodeUid::from_bytes([u8::try_from(slot.0).unwrap() + 1; 16])
}

impl Table {
    /// `slots` nodes in generation 1, and the VM in epoch 1 of slot 0.
    pub(crate) fn new(slots: u16, fencing: Fencing) -> Self {
        let superblock = FormatRequest {
            volume: VolumeId::from_bytes([1; 16]),
            cluster: ClusterId::from_bytes([2; 16]),
            fencing,
            policy: FencingPolicy::default(),
            timings: Timings::DEFAULT,
            slot_count: slots,
            extent_mib: 1,
            device_bytes: 64 << 20,
        };
        let mut table = Self(Metadata::new(&superblock.lay_out().unwrap()));
        for slot in (0..slots).map(SlotId) {
            let node = node(slot);
            table.must(&Change::RegisterNode { node }, owner(slot.0, 0));
            table.must(&rejoin(owner(slot.0, 0), false), owner(slot.0, 1));
        }
        let name = RowName::new("default/web").unwrap();
        let create = Change::CreateVm {
            vm: VM,
            name,
            spec_digest: [0; 32],
        };
        table.must(&create, owner(0, 1));
        let acquire = Change::Acquire {
            vm: VM,
            expected_epoch: Epoch(0),
            to: owner(0, 1),
        };
        table.must(&acquire, owner(0, 1));
        table
    }

    fn must(&mut self, change: &Change, requester: Owner) {
        let witness = TestWitness {
            alive: |_| true,
            over: |_| Err(MissingProof::Alive),
            proof: |_| Err(MissingProof::Alive),
        };
        self.ask(change, (requester, 1), &witness, Rules::ENFORCED)
            .unwrap();
    }

    /// Decides a change and makes it durable. A broken rule alters the change or its records.
    pub(crate) fn ask(
        &mut self,
        change: &Change,
        (requester, boot): (Owner, u8),
        witness: &dyn Witness,
        rules: Rules,
    ) -> Result<Answer, Refusal> {
        let context = Context {
            requester: Requester {
                node: node(requester.slot),
                owner: Some(requester),
                boot: [boot; 16],
            },
            witness,
            fresh_disk: DiskId::from_bytes([9; 16]),
            rules,
        };
        let change = self.broken_change(change, rules);
        let decision = self.0.decide(&change, &context)?;
        self.apply(&decision.records, rules);
        Ok(decision.answer)
    }

    fn apply(&mut self, records: &[MetaRecord], rules: Rules) {
        for record in records {
            let record = Self::broken_record(record, rules);
            self.0.apply(&record).unwrap();
        }
    }

    fn broken_change(&self, change: &Change, rules: Rules) -> Change {
        let mut change = change.clone();
        let row = self.0.vm(VM);
        match (&mut change, row) {
            (Change::Transfer { from, epoch, .. }, Some(row))
                if rules.breaks(Mutation::TransferIgnoresEpoch) =>
            {
                *from = row.owner.unwrap_or(*from);
                *epoch = row.epoch;
            }
            (Change::ConfirmFenced { victim, .. }, _)
                if rules.breaks(Mutation::ConfirmationForAnyGeneration) =>
            {
                let slot = self.0.slot(victim.slot);
                *victim = slot.map_or(*victim, |row| row.owner());
            }
            _ => {}
        }
        change
    }

    fn broken_record(record: &MetaRecord, rules: Rules) -> MetaRecord {
        let mut record = record.clone();
        match &mut record {
            MetaRecord::Vm(row) if rules.breaks(Mutation::AttemptForgotten) => row.attempt = None,
            _ => {}
        }
        record
    }

    /// The VM's row.
    pub(crate) fn row(&self) -> Row {
        let row = self.0.vm(VM).unwrap();
        Row {
            owner: row.owner,
            epoch: row.epoch,
            attempt: row.attempt,
        }
    }

    /// A slot's generation.
    pub(crate) fn generation(&self, slot: u16) -> u64 {
        self.0.slot(SlotId(slot)).unwrap().generation.0
    }

    /// Whether this owner is fenced.
    pub(crate) fn is_fenced(&self, victim: Owner) -> bool {
        self.0.fence(victim).is_some()
    }
}

/// The change by which a node joins in its next generation.
pub(crate) fn rejoin(from: Owner, rebooted: bool) -> Change {
    Change::Rejoin {
        node: node(from.slot),
        from,
        rebooted,
    }
}
