//! Features: raised when every joined node has them, kept for good, and announced by the superblock.

use std::collections::BTreeSet;

use bascule_types::{Change, Owner, Refusal, SlotId, VmUid};
use bascule_volume_format::{
    AreaId, BlockStore as _, CoordinatorEpoch, Features, Follower, FormatError, Log, MemStore,
    MetaRecord, OpenError, RewriteError, Rules, Severity, Superblock, UnknownFeatures,
    check_volume, plan_repair, read_copies, read_superblock, recover, rewrite_superblock,
};

use crate::fixture::{Cluster, commit, formatted, name, node, owner};

/// A release without it may read.
const RO_COMPAT: Features = Features::from_bits(1);
/// A release without it must not even read.
const INCOMPAT: Features = Features::from_bits(1 << 32);
const BOTH: Features = RO_COMPAT.with(INCOMPAT);

fn raise(cluster: &mut Cluster, supported: Features) -> Features {
    let record = cluster
        .metadata
        .raise_features(supported, &cluster.seen, Rules::ENFORCED);
    if let Some(record) = record {
        cluster.metadata.apply(&record).unwrap();
    }
    cluster.metadata.features()
}

fn rejoin(cluster: &mut Cluster, n: u8, from: Owner, to: Owner) -> Result<(), Refusal> {
    cluster.seen.alive.insert(to);
    let change = Change::Rejoin {
        node: node(n),
        from,
        rebooted: true,
    };
    cluster.ask(n, &change).map(drop)
}

#[test]
fn a_feature_is_raised_when_the_newest_heartbeat_of_every_joined_node_has_it() {
    let mut cluster = Cluster::with_two_nodes();
    cluster
        .ask(1, &Change::RegisterNode { node: node(3) })
        .unwrap();
    // No heartbeat was read.
    assert_eq!(raise(&mut cluster, BOTH), Features::NONE);
    cluster.seen.features.insert(owner(0, 1), BOTH);
    assert_eq!(raise(&mut cluster, BOTH), Features::NONE);
    cluster.seen.features.insert(owner(1, 1), INCOMPAT);
    assert_eq!(raise(&mut cluster, RO_COMPAT), Features::NONE);
    assert_eq!(raise(&mut cluster, BOTH), INCOMPAT);
    // The next release of the second node, which has not joined yet.
    let (from, to) = (owner(1, 1), owner(1, 2));
    cluster.seen.features.insert(to, BOTH);
    assert_eq!(raise(&mut cluster, BOTH), INCOMPAT);
    assert_eq!(rejoin(&mut cluster, 2, from, to), Ok(()));
    // The third node has a slot and never joined: it has no say.
    assert_eq!(raise(&mut cluster, BOTH), BOTH);
    // Nothing is lowered.
    cluster.seen.features.insert(owner(1, 3), Features::NONE);
    assert_eq!(raise(&mut cluster, BOTH), BOTH);
}

#[test]
fn no_node_joins_without_a_feature_that_was_raised_nor_before_its_heartbeat_was_read() {
    let mut cluster = Cluster::with_two_nodes();
    for slot in [0, 1] {
        cluster.seen.features.insert(owner(slot, 1), BOTH);
    }
    assert_eq!(raise(&mut cluster, BOTH), BOTH);
    let (from, to) = (owner(1, 1), owner(1, 2));
    let missing = |features: Features| {
        let features = features.bits();
        Err(Refusal::FeaturesMissing { features })
    };
    // The newest record that was read is of the generation before.
    assert_eq!(rejoin(&mut cluster, 2, from, to), missing(BOTH));
    cluster.seen.features.insert(to, RO_COMPAT);
    assert_eq!(rejoin(&mut cluster, 2, from, to), missing(INCOMPAT));
    cluster.seen.features.insert(to, BOTH);
    assert_eq!(rejoin(&mut cluster, 2, from, to), Ok(()));
    // A node that was never there is asked as well.
    cluster
        .ask(1, &Change::RegisterNode { node: node(3) })
        .unwrap();
    let (from, to) = (owner(2, 0), owner(2, 1));
    assert_eq!(rejoin(&mut cluster, 3, from, to), missing(BOTH));
}

#[test]
fn a_table_without_room_for_another_vm_has_room_for_features_and_every_slot() {
    let (_, superblock) = formatted();
    let mut cluster = Cluster::of(&superblock);
    let half = AreaId {
        slot: SlotId(0),
        half: 0,
    };
    let rows_max = superblock.area(half).rows_max();
    for n in 0_u64.. {
        let create = Change::CreateVm {
            vm: VmUid::from_bytes(u128::from(n).to_be_bytes()),
            name: name(&format!("shop/vm-{n}")),
            spec_digest: [0; 32],
        };
        if cluster.ask(1, &create).is_err() {
            break;
        }
        assert!(n < rows_max);
    }
    for slot in [0, 1] {
        cluster.seen.features.insert(owner(slot, 1), BOTH);
    }
    let free = rows_max - cluster.metadata.row_count();
    // Of each slot the row, two of which are there, and two fences; and the features.
    assert_eq!(free, 4 * 3 - 2 + 1);
    assert_eq!(raise(&mut cluster, RO_COMPAT), RO_COMPAT);
    assert_eq!(rows_max - cluster.metadata.row_count(), free - 1);
    assert_eq!(raise(&mut cluster, BOTH), BOTH);
    assert_eq!(rows_max - cluster.metadata.row_count(), free - 1);
}

/// A volume whose journal raises these features, one after the other.
fn with_features(features: &[Features]) -> (MemStore, Superblock) {
    let (mut store, superblock) = formatted();
    let recovered = recover(&mut store, &superblock).unwrap();
    let term = (SlotId(0), CoordinatorEpoch(1));
    let mut log = Log::start(&mut store, &superblock, &recovered, term, &BTreeSet::new()).unwrap();
    let mut metadata = recovered.metadata;
    for features in features {
        let group = [MetaRecord::Features(*features)];
        commit(&mut log, &mut store, &mut metadata, &group).unwrap();
    }
    (store, superblock)
}

#[test]
fn raised_features_are_kept_by_the_journal_by_checkpoints_and_by_a_node_that_follows() {
    let (mut store, superblock) = with_features(&[]);
    let follower = Follower::from(recover(&mut store, &superblock).unwrap());
    let (mut store, superblock) = with_features(&[RO_COMPAT, INCOMPAT]);
    let epoch = CoordinatorEpoch(1);
    let followed = follower.follow(&mut store, &superblock, epoch).unwrap();
    let (followed, is_changed) = followed.unwrap();
    assert!(is_changed);
    assert_eq!(followed.metadata().overview().features, BOTH);
    let recovered = recover(&mut store, &superblock).unwrap();
    assert_eq!(recovered.metadata.features(), BOTH);
    let term = (SlotId(1), CoordinatorEpoch(2));
    Log::start(&mut store, &superblock, &recovered, term, &BTreeSet::new()).unwrap();
    let later = recover(&mut store, &superblock).unwrap();
    assert_eq!(
        (later.base.epoch, later.metadata),
        (term.1, recovered.metadata)
    );
}

/// A volume whose superblock names these features, too.
fn announced(features: Features) -> (MemStore, Superblock) {
    let (mut store, superblock) = with_features(&[features]);
    let next = Superblock {
        features,
        revision: superblock.revision + 1,
        ..superblock
    };
    rewrite_superblock(&mut store, &next, BOTH).unwrap();
    (store, next)
}

#[test]
fn a_volume_with_an_incompat_feature_is_refused_by_a_release_without_it() {
    let (mut store, superblock) = announced(BOTH);
    for known in [Features::NONE, RO_COMPAT] {
        let error = read_copies(&mut store, known).unwrap_err();
        let cause = FormatError::Features(INCOMPAT);
        assert!(matches!(error, OpenError::Newer(found) if found == cause));
    }
    assert_eq!(read_copies(&mut store, BOTH).unwrap().current, superblock);
    let error = check_volume(&mut store).unwrap_err();
    assert!(matches!(error, OpenError::Newer(_)), "{error}");
}

#[test]
fn a_volume_with_a_ro_compat_feature_is_checked_and_not_written_by_a_release_without_it() {
    let (mut store, superblock) = announced(RO_COMPAT);
    assert_eq!(read_superblock(&mut store).unwrap(), superblock);
    let unknown = Err(UnknownFeatures(RO_COMPAT));
    assert_eq!(superblock.check_writable(Features::KNOWN), unknown);
    assert_eq!(superblock.check_writable(BOTH), Ok(()));
    let report = check_volume(&mut store).unwrap();
    // No coordinator was elected.
    let mut findings = report.findings.iter();
    assert!(findings.all(|finding| finding.text.contains("coordinator epoch")));
    // What it may not write it does not repair either.
    let damaged = superblock.last_copy();
    store.write(damaged, &[7; 4096]).unwrap();
    let repair = plan_repair(&mut store).unwrap();
    assert!(repair.steps.is_empty() && repair.refused.len() == 1);
    let next = Superblock {
        revision: superblock.revision + 1,
        ..superblock
    };
    let error = rewrite_superblock(&mut store, &next, Features::KNOWN).unwrap_err();
    assert!(matches!(error, RewriteError::Unknown(_)), "{error}");
}

#[test]
fn check_reports_features_that_only_the_journal_has() {
    let findings = |features| {
        let (mut store, _) = with_features(&[features]);
        let report = check_volume(&mut store).unwrap();
        let findings = report.findings.into_iter();
        // No coordinator was elected.
        let mut findings: Vec<_> = findings
            .filter(|finding| !finding.text.contains("coordinator epoch"))
            .collect();
        findings.sort_by_key(|finding| finding.severity);
        findings
    };
    let known = findings(RO_COMPAT);
    assert_eq!(known.len(), 1, "{known:?}");
    assert!(known[0].text.contains("does not name the features 0x1 yet"));
    let unknown = findings(INCOMPAT);
    assert_eq!(unknown.len(), 2, "{unknown:?}");
    assert_eq!(unknown[1].severity, Severity::Error);
    assert!(unknown[1].text.contains("0x100000000"), "{unknown:?}");
}
