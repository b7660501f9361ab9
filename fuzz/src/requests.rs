//! What nodes ask of a volume's coordinator, and what must hold of its decisions. Read next: `change`.

mod change;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use arbitrary::{Arbitrary, Unstructured};
use bascule_types::{
    Change, DiskId, Epoch, ExtentRun, FenceProof, Generation, MissingProof, NodeUid, Owner, SlotId,
    VolumeId,
};
use bascule_volume::peer_rpc::{PeerOperation, PeerRequest, frames};
use bascule_volume_format::{
    Context, CoordinatorEpoch, DECISION_MAX, Features, Log, MemStore, MetaRecord, Metadata,
    Requester, Rules, Superblock, Witness, recover,
};

use self::change::{Choice, Wanted};
use crate::volume::formatted;

/// A request, with what the coordinator knows of other nodes when it decides.
#[derive(Arbitrary, Debug)]
struct Asked {
    node: u8,
    /// How much later the requester's generation is than its slot's row.
    newer_by: Option<u8>,
    has_booted: bool,
    /// Bit n: of slot n, whether its lease is valid, and whether it is proved to have ended.
    alive: u8,
    proved: u8,
    change: Wanted,
}

/// A coordinator in one term, and the volume that it writes.
struct Coordinator {
    store: MemStore,
    superblock: Superblock,
    log: Log,
    metadata: Metadata,
    disks: u8,
}

/// What a coordinator knows of other nodes: any.
struct Seen {
    alive: u8,
    proved: u8,
    /// Whether a proof was asked for and given.
    gave_proof: Cell<bool>,
}

pub(crate) fn requests(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut coordinator = Coordinator::elected();
    for _ in 0..REQUESTS_MAX {
        if input.is_empty() {
            break;
        }
        let Ok(asked) = Asked::arbitrary(&mut input) else {
            break;
        };
        coordinator.serve(&asked);
    }
    let Coordinator {
        mut store,
        superblock,
        metadata,
        ..
    } = coordinator;
    // A successor reads from the volume what was granted, and rows rebuild themselves.
    let recovered = recover(&mut store, &superblock).unwrap();
    assert_eq!(recovered.metadata, metadata);
    let mut rebuilt = Metadata::new(&superblock);
    for row in metadata.rows() {
        rebuilt.apply(&row).unwrap();
    }
    assert_eq!(rebuilt, metadata);
}

impl Coordinator {
    fn elected() -> Self {
        let (mut store, superblock) = formatted();
        let recovered = recover(&mut store, &superblock).unwrap();
        let term = (SlotId(0), CoordinatorEpoch(recovered.base.epoch.0 + 1));
        let log = Log::start(&mut store, &superblock, &recovered, term, &BTreeSet::new()).unwrap();
        Self {
            store,
            superblock,
            log,
            metadata: recovered.metadata,
            disks: 0,
        }
    }

    /// Decides a request as it comes from its node, makes what is granted durable, and checks the rows.
    fn serve(&mut self, asked: &Asked) {
        let node = NodeUid::from_bytes([0x33 + asked.node % NODES; 16]);
        let slot = self.metadata.slot_of(node);
        let owner = slot.map(|row| Owner {
            slot: row.slot,
            generation: Generation(row.generation.0 + u64::from(asked.newer_by.unwrap_or(0))),
        });
        let choice = Choice(&self.metadata);
        let Some(change) = choice.change(&asked.change, node, owner) else {
            return;
        };
        let request = PeerRequest {
            volume: VolumeId::from_bytes([0x11; 16]),
            node,
            owner,
            boot: [u8::from(asked.has_booted); 16],
            operation: PeerOperation::Change(change),
        };
        let mut sent = vec![];
        frames::write(&request, &mut sent).unwrap();
        let request = frames::request(&mut sent.as_slice()).unwrap();
        let PeerOperation::Change(change) = &request.operation else {
            panic!("a change arrives as one");
        };
        self.disks = self.disks.wrapping_add(1);
        let seen = Seen {
            alive: asked.alive,
            proved: asked.proved,
            gave_proof: Cell::new(false),
        };
        let context = Context {
            requester: Requester {
                node: request.node,
                owner: request.owner,
                boot: request.boot,
            },
            witness: &seen,
            fresh_disk: DiskId::from_bytes([self.disks; 16]),
            rules: Rules::ENFORCED,
        };
        let Ok(decision) = self.metadata.decide(change, &context) else {
            return;
        };
        assert!(decision.records.len() <= DECISION_MAX);
        let before = self.metadata.clone();
        self.commit(&decision.records);
        let again = self.metadata.decide(change, &context).unwrap();
        assert!(again.records.is_empty(), "{change:?} has one effect");
        assert_eq!(again.answer, decision.answer, "{change:?}");
        self.check_owners(&before, change, &seen);
        self.check_space();
    }

    fn commit(&mut self, group: &[MetaRecord]) {
        self.log
            .checkpoint_if_due(&mut self.store, &self.metadata)
            .unwrap();
        self.log.commit(&mut self.store, group).unwrap();
        for record in group {
            self.metadata.apply(record).unwrap();
        }
    }

    /// No VM changes its owner without a new epoch but to a later generation of the same node; no epoch falls; and nobody
    /// loses a VM to another node without having asked for it or a proof.
    fn check_owners(&self, before: &Metadata, change: &Change, seen: &Seen) {
        for row in self.metadata.vms() {
            let Some(old) = before.vm(row.vm) else {
                assert_eq!((row.owner, row.epoch), (None, Epoch(0)));
                continue;
            };
            assert!(row.epoch.0 - old.epoch.0 <= 1, "{change:?}");
            let (Some(was), Some(is)) = (old.owner, row.owner) else {
                continue;
            };
            if was == is && old.epoch == row.epoch {
                continue;
            }
            if old.epoch == row.epoch {
                let rejoins = matches!(change, Change::Rejoin { .. });
                assert!(rejoins && was.slot == is.slot && was.generation < is.generation);
            } else if was != is {
                let is_asked_for = matches!(change, Change::Transfer { .. });
                let is_fenced = before.fence(was).is_some() || seen.gave_proof.get();
                assert!(is_asked_for || is_fenced, "{change:?}");
            }
            assert_eq!(self.metadata.slot(is.slot).unwrap().owner(), is);
        }
    }

    /// What is allocated and what is free make up the volume, and nothing is allocated twice.
    fn check_space(&self) {
        let disks = self.metadata.disks().flat_map(|disk| &disk.extents);
        let saved = self
            .metadata
            .saved_states()
            .flat_map(|saved| &saved.extents);
        let mut ends = BTreeMap::new();
        let mut used = 0;
        for ExtentRun { start, length } in disks.chain(saved) {
            used += length.0;
            assert_eq!(ends.insert(start.0, start.0 + length.0 / 4096), None);
        }
        assert_eq!(used + self.metadata.free().0, self.metadata.capacity().0);
        let starts = ends.keys().skip(1);
        assert!(ends.values().zip(starts).all(|(end, next)| end <= next));
    }
}

impl Witness for Seen {
    fn lease_valid(&self, owner: Owner) -> bool {
        is_set(self.alive, owner)
    }

    fn lease_over(&self, victim: Owner) -> Result<(), MissingProof> {
        let over = !is_set(self.alive, victim);
        over.then_some(()).ok_or(MissingProof::Alive)
    }

    fn proof(&self, victim: Owner) -> Result<FenceProof, MissingProof> {
        let proof = FenceProof::SafeTimeElapsed {
            watched_ms: 26_000,
            required_ms: 26_000,
        };
        let proved = is_set(self.proved, victim) && !is_set(self.alive, victim);
        self.gave_proof.set(proved);
        proved.then_some(proof).ok_or(MissingProof::Alive)
    }

    fn newest_record(&self, _slot: SlotId) -> Option<(Owner, Features)> {
        None
    }
}

fn is_set(bits: u8, owner: Owner) -> bool {
    owner.slot.0 < 8 && bits & (1 << owner.slot.0) != 0
}

/// Those that ask; the volume has fewer slots.
const NODES: u8 = 3;
/// Of one input; a guess at what still runs fast.
const REQUESTS_MAX: usize = 64;
