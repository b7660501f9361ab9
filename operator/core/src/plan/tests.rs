//! Decisions, one sentence each. [`Case`] is a cluster of three healthy nodes on which a test says
//! what is different.

mod bad_input;
mod case;
mod deletion;
mod drain;
mod failure;
mod imports;
mod lifecycle;
mod migration;
mod moves;
mod quota;
mod unknown;

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_ipc::vm::{MigrationPhase as Copy, StopReason, VmState};
use bascule_ipc::volume::{FencingMode, PathState, WatchdogKind};
use bascule_types::{AttemptId, Change, Epoch, Generation, MissingProof, Refusal};
use proptest::prelude::*;

use self::case::{Case, NOW, failover, node_owner};
use crate::MigrationPhase;
use crate::{
    Action, DrainPolicy, Fact, FailoverUpdate, FailoverView, FailurePolicy, ForeignPod,
    MigrationMode, Moment, Phase, PodPhase, Purpose, ReservationRefusal, RunPolicy, SavedView,
    Stream,
};

proptest! {
    /// Whatever is known or not, no plan starts a guest that its row does not give to that node, and
    /// none acts on a row that no node could read.
    #[test]
    fn no_plan_starts_a_guest_without_its_row(
        owner in proptest::option::of(0_u16..3),
        pod in proptest::option::of(0_u16..3),
        down in proptest::collection::vec(any::<bool>(), 3),
        lost_heartbeats in proptest::collection::vec(any::<bool>(), 3),
        known in any::<bool>(),
        draining in any::<bool>(),
    ) {
        let mut case = Case::new();
        if let Some(owner) = owner {
            case = case.owned_by(owner);
        }
        if let Some(pod) = pod {
            case = case.with_pod(&format!("node-{pod}"));
        }
        for slot in 0..3_u16 {
            if down[usize::from(slot)] {
                case.node(&format!("node-{slot}")).stream = Stream::Down { since: NOW };
            }
            case = case.heartbeat(slot, !lost_heartbeats[usize::from(slot)]);
        }
        if draining && pod.is_some() {
            case = case.draining();
        }
        if !known {
            case.observed.row = Fact::Unknown;
        }
        let actions = case.plan().actions;
        prop_assert!(known || actions.is_empty());
        for action in actions {
            if let Action::StartVm { node, owner: given, .. } = action {
                prop_assert_eq!(owner.map(node_owner), Some(given));
                prop_assert_eq!(owner.map(|slot| format!("node-{slot}")), Some(node));
            }
        }
    }
}
