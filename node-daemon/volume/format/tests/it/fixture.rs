//! Fixtures: a volume in memory, and a coordinator whose evidence the test sets.

use std::collections::{BTreeMap, BTreeSet};

use bascule_types::{
    Answer, Change, ClusterId, DiskId, Epoch, FenceProof, Generation, MissingProof, NodeUid, Owner,
    Refusal, RowName, SlotId, VmRow, VmUid, VolumeId,
};
use bascule_volume_format::{
    BlockStore, Context, DECISION_MAX, Features, Fencing, FencingPolicy, FormatRequest, Log,
    LogError, MemStore, MetaRecord, Metadata, Requester, Rules, Superblock, Timings, Witness,
    make_volume,
};

pub(crate) const DEVICE_BYTES: u64 = 64 << 20;

pub(crate) fn request() -> FormatRequest {
    FormatRequest {
        volume: VolumeId::from_bytes([0x11; 16]),
        cluster: ClusterId::from_bytes([0x22; 16]),
        fencing: Fencing::Watchdog,
        policy: FencingPolicy::default(),
        timings: Timings::DEFAULT,
        slot_count: 4,
        extent_mib: 1,
        device_bytes: DEVICE_BYTES,
    }
}

pub(crate) fn node(n: u8) -> NodeUid {
    NodeUid::from_bytes([n; 16])
}

pub(crate) fn vm(n: u8) -> VmUid {
    VmUid::from_bytes([0xA0 + n; 16])
}

pub(crate) fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

pub(crate) fn name(text: &str) -> RowName {
    RowName::new(text).unwrap()
}

pub(crate) fn formatted() -> (MemStore, Superblock) {
    let mut store = MemStore::new(DEVICE_BYTES / 4096);
    let superblock = make_volume(&mut store, &request(), Some(node(1))).unwrap();
    (store, superblock)
}

/// Makes a group durable as the coordinator does, and applies it; `metadata` keeps its value when that fails.
pub(crate) fn commit<S: BlockStore>(
    log: &mut Log,
    store: &mut S,
    metadata: &mut Metadata,
    group: &[MetaRecord],
) -> Result<(), LogError> {
    let mut after = metadata.clone();
    for record in group {
        after.apply(record)?;
    }
    log.checkpoint_if_due(store, metadata)?;
    log.commit(store, group)?;
    *metadata = after;
    Ok(())
}

/// The coordinator's evidence, set by the test.
#[derive(Default)]
pub(crate) struct TestWitness {
    pub(crate) alive: BTreeSet<Owner>,
    /// The coordinator could not read the volume for a while: it saw nothing rise.
    pub(crate) unread: bool,
    pub(crate) proofs: BTreeMap<Owner, FenceProof>,
    /// The features in the heartbeats of these generations; no other record was read.
    pub(crate) features: BTreeMap<Owner, Features>,
}

impl Witness for TestWitness {
    fn lease_valid(&self, owner: Owner) -> bool {
        self.alive.contains(&owner) && !self.unread
    }

    fn lease_over(&self, victim: Owner) -> Result<(), MissingProof> {
        if self.alive.contains(&victim) || self.unread {
            return Err(MissingProof::Alive);
        }
        Ok(())
    }

    fn proof(&self, victim: Owner) -> Result<FenceProof, MissingProof> {
        self.proofs.get(&victim).copied().ok_or(MissingProof::Alive)
    }

    fn newest_record(&self, slot: SlotId) -> Option<(Owner, Features)> {
        let mut records = self.features.iter().rev();
        let newest = records.find(|(owner, _)| owner.slot == slot);
        newest.map(|(owner, features)| (*owner, *features))
    }
}

/// Metadata with a view of the nodes; every granted change is applied at once.
pub(crate) struct Cluster {
    pub(crate) metadata: Metadata,
    pub(crate) seen: TestWitness,
    disks: u32,
}

impl Cluster {
    /// Nodes 1 and 2 in slots 0 and 1, both alive in generation 1.
    pub(crate) fn with_two_nodes() -> Self {
        Self::of(&request().lay_out().unwrap())
    }

    pub(crate) fn of(superblock: &Superblock) -> Self {
        let mut cluster = Self {
            metadata: Metadata::new(superblock),
            seen: TestWitness::default(),
            disks: 0,
        };
        for n in [1, 2] {
            cluster.join(n);
        }
        cluster
    }

    pub(crate) fn join(&mut self, n: u8) {
        let slot = u16::from(n - 1);
        self.seen.alive.insert(owner(slot, 1));
        self.ask(n, &Change::RegisterNode { node: node(n) })
            .unwrap();
        let rejoin = Change::Rejoin {
            node: node(n),
            from: owner(slot, 0),
            rebooted: true,
        };
        self.ask(n, &rejoin).unwrap();
    }

    /// Asks as node `n` in the newest generation that is alive in its slot.
    pub(crate) fn ask(&mut self, n: u8, change: &Change) -> Result<Answer, Refusal> {
        self.disks += 1;
        let slot = SlotId(u16::from(n - 1));
        let mine = self.seen.alive.iter().filter(|owner| owner.slot == slot);
        let context = Context {
            requester: Requester {
                node: node(n),
                owner: mine.max().copied(),
                boot: [n; 16],
            },
            witness: &self.seen,
            fresh_disk: DiskId::from_bytes(u128::from(self.disks).to_be_bytes()),
            rules: Rules::ENFORCED,
        };
        let decision = self.metadata.decide(change, &context)?;
        assert!(decision.records.len() <= DECISION_MAX, "{decision:?}");
        for record in &decision.records {
            self.metadata.apply(record).unwrap();
        }
        // Idempotent: the repeated request gets the same answer and no further record.
        let again = self.metadata.decide(change, &context).unwrap();
        assert_eq!(again.answer, decision.answer, "{change:?}");
        assert!(again.records.is_empty(), "{change:?}: {:?}", again.records);
        Ok(decision.answer)
    }

    pub(crate) fn create_vm(&mut self, n: u8) {
        let change = Change::CreateVm {
            vm: vm(n),
            name: name(&format!("shop/web-{n}")),
            spec_digest: [n; 32],
        };
        self.ask(1, &change).unwrap();
    }

    /// VM 1, owned by slot 0 generation 1 in epoch 1.
    pub(crate) fn with_running_vm(mut self) -> Self {
        self.create_vm(1);
        self.acquire(1, 1, 0, owner(0, 1)).unwrap();
        self
    }

    pub(crate) fn acquire(
        &mut self,
        n: u8,
        v: u8,
        expected: u64,
        to: Owner,
    ) -> Result<Answer, Refusal> {
        let expected_epoch = Epoch(expected);
        let change = Change::Acquire {
            vm: vm(v),
            expected_epoch,
            to,
        };
        self.ask(n, &change)
    }

    pub(crate) fn row(&self, v: u8) -> &VmRow {
        self.metadata.vm(vm(v)).unwrap()
    }
}
