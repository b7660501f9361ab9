//! Nodes of two releases on one volume: every order of reboots, upgrades, reads of heartbeats, joins and raised
//! features, of two nodes in two generations each. A coordinator sees of a node only the heartbeat that it last read.

use std::collections::{BTreeSet, VecDeque};

use bascule_types::{
    Change, ClusterId, DiskId, FenceProof, Generation, MissingProof, NodeUid, Owner, SlotId,
    VolumeId,
};
use bascule_volume_format::{
    Context, Features, Fencing, FencingPolicy, FormatRequest, Metadata, Requester, Timings, Witness,
};
use bascule_volume_protocol::{Mutation, Rules};

const FEATURE: Features = Features::from_bits(1 << 40);
const NODES: usize = 2;
const GENERATIONS: u64 = 2;

/// A node, and what the coordinator has read of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Node {
    /// The generation in its newest heartbeat, and whether that has the feature.
    heartbeat: (u64, bool),
    /// The heartbeat that the coordinator last read.
    seen: Option<(u64, bool)>,
    /// Whether the generation that has joined supports the feature.
    joined_supports: bool,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The node begins a generation, with a release that supports the feature or not.
    Begin(usize, bool),
    /// A later release takes the node's lease over, in its generation.
    Upgrade(usize),
    /// The coordinator reads the node's heartbeat.
    Read(usize),
    Join(usize),
    Raise,
}

#[derive(Clone)]
struct State {
    metadata: Metadata,
    nodes: [Node; NODES],
}

/// What tells two states apart: the nodes, their joined generations, and whether the feature is raised.
type Key = ([Node; NODES], Vec<u64>, bool);

fn owner(n: usize, generation: u64) -> Owner {
    Owner {
        slot: SlotId(u16::try_from(n).unwrap()),
        generation: Generation(generation),
    }
}

fn uid(n: usize) -> NodeUid {
    NodeUid::from_bytes([u8::try_from(n).unwrap() + 1; 16])
}

fn features(supports: bool) -> Features {
    if supports { FEATURE } else { Features::NONE }
}

struct Seen([Node; NODES]);

impl Witness for Seen {
    fn lease_valid(&self, _: Owner) -> bool {
        true
    }

    fn lease_over(&self, _: Owner) -> Result<(), MissingProof> {
        Err(MissingProof::Alive)
    }

    fn proof(&self, _: Owner) -> Result<FenceProof, MissingProof> {
        Err(MissingProof::Alive)
    }

    fn newest_record(&self, slot: SlotId) -> Option<(Owner, Features)> {
        let n = usize::from(slot.0);
        let (generation, supports) = self.0[n].seen?;
        Some((owner(n, generation), features(supports)))
    }
}

impl State {
    fn new() -> Self {
        let request = FormatRequest {
            volume: VolumeId::from_bytes([1; 16]),
            cluster: ClusterId::from_bytes([2; 16]),
            fencing: Fencing::Watchdog,
            policy: FencingPolicy::default(),
            timings: Timings::DEFAULT,
            slot_count: 2,
            extent_mib: 1,
            device_bytes: 64 << 20,
        };
        let mut state = Self {
            metadata: Metadata::new(&request.lay_out().unwrap()),
            nodes: [Node::default(); NODES],
        };
        for n in 0..NODES {
            let node = uid(n);
            state.decide(&Change::RegisterNode { node }, n, Rules::ENFORCED);
        }
        state
    }

    /// Whether the change is granted.
    fn decide(&mut self, change: &Change, n: usize, rules: Rules) -> bool {
        let seen = Seen(self.nodes);
        let context = Context {
            requester: Requester {
                node: uid(n),
                owner: Some(owner(n, self.nodes[n].heartbeat.0)),
                boot: [1; 16],
            },
            witness: &seen,
            fresh_disk: DiskId::from_bytes([9; 16]),
            rules,
        };
        let Ok(decision) = self.metadata.decide(change, &context) else {
            return false;
        };
        for record in decision.records {
            self.metadata.apply(&record).unwrap();
        }
        true
    }

    fn joined(&self, n: usize) -> Owner {
        self.metadata.slot_of(uid(n)).unwrap().owner()
    }

    fn step(&mut self, step: Step, rules: Rules) {
        match step {
            Step::Begin(n, supports) => {
                let next = self.nodes[n].heartbeat.0 + 1;
                if next <= GENERATIONS {
                    self.nodes[n].heartbeat = (next, supports);
                }
            }
            Step::Upgrade(n) => {
                let (generation, _) = self.nodes[n].heartbeat;
                self.nodes[n].heartbeat.1 = generation > 0;
                if generation > 0 && self.joined(n).generation.0 == generation {
                    self.nodes[n].joined_supports = true;
                }
            }
            Step::Read(n) => {
                let heartbeat = self.nodes[n].heartbeat;
                self.nodes[n].seen = (heartbeat.0 > 0).then_some(heartbeat);
            }
            Step::Join(n) => {
                let change = Change::Rejoin {
                    node: uid(n),
                    from: self.joined(n),
                    rebooted: true,
                };
                let (generation, supports) = self.nodes[n].heartbeat;
                if generation > self.joined(n).generation.0 && self.decide(&change, n, rules) {
                    self.nodes[n].joined_supports = supports;
                }
            }
            Step::Raise => {
                let seen = Seen(self.nodes);
                let raised = self.metadata.raise_features(FEATURE, &seen, rules);
                if let Some(record) = raised {
                    self.metadata.apply(&record).unwrap();
                }
            }
        }
    }

    fn is_raised(&self) -> bool {
        self.metadata.features() == FEATURE
    }

    /// A node that has joined works on a volume with a feature that it does not support.
    fn is_broken(&self) -> bool {
        let mut nodes = self.nodes.iter().enumerate();
        self.is_raised()
            && nodes.any(|(n, node)| self.joined(n).generation.0 > 0 && !node.joined_supports)
    }

    fn key(&self) -> Key {
        let joined = (0..NODES).map(|n| self.joined(n).generation.0);
        (self.nodes, joined.collect(), self.is_raised())
    }
}

fn steps() -> Vec<Step> {
    let of_node = |n| {
        [
            Step::Begin(n, false),
            Step::Begin(n, true),
            Step::Upgrade(n),
            Step::Read(n),
            Step::Join(n),
        ]
    };
    (0..NODES).flat_map(of_node).chain([Step::Raise]).collect()
}

/// The shortest way to a broken state, if there is one, and all states that were reached.
fn search(rules: Rules) -> (Option<Vec<Step>>, BTreeSet<Key>) {
    let mut reached = BTreeSet::new();
    let mut queue = VecDeque::from([(State::new(), Vec::new())]);
    while let Some((state, way)) = queue.pop_front() {
        for step in steps() {
            let mut next = state.clone();
            next.step(step, rules);
            if !reached.insert(next.key()) {
                continue;
            }
            let mut way = way.clone();
            way.push(step);
            if next.is_broken() {
                return (Some(way), reached);
            }
            queue.push_back((next, way));
        }
    }
    (None, reached)
}

#[test]
fn no_node_that_has_joined_lacks_a_feature_that_was_raised() {
    let (way, reached) = search(Rules::ENFORCED);
    assert!(way.is_none(), "{way:?}");
    println!("{} states", reached.len());
    // Both nodes in their last generation, with the feature raised and without.
    for is_raised in [false, true] {
        let mut reached = reached.iter();
        assert!(reached.any(|(_, joined, raised)| {
            *raised == is_raised && joined.iter().all(|joined| *joined == GENERATIONS)
        }));
    }
}

#[test]
fn each_rule_about_features_is_needed() {
    for mutation in [
        Mutation::RaiseWithoutAsking,
        Mutation::OtherGenerationHasFeatures,
        Mutation::JoinWithoutFeatures,
    ] {
        let (way, _) = search(Rules::without(mutation));
        println!("{mutation:?}: {way:?}");
        assert!(way.is_some(), "{mutation:?} breaks nothing");
    }
}
