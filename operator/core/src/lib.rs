//! The operator's decisions as pure functions: [`plan`] and [`plan_volume`] compare the intent
//! ([`VmIntent`], [`VolumeIntent`]) with the observation ([`Observed`], [`VolumeObserved`]) and return
//! the actions to take ([`Plan`], [`VolumePlan`]).
//!
//! # Guarantees
//! The functions are pure and total. The caller observes, plans, executes, and begins again; a plan
//! may be carried out in part, twice, late, or by two operators at once. None of that can make two
//! guests write to one disk, because the volume decides who owns a virtual machine; it can only
//! make something late.
//!
//! # Assumes
//! Facts may be stale. What is not known is [`Fact::Unknown`], and nothing is torn down on account
//! of it.
//!
//! This crate must not know kube, gRPC, async or a clock. Read next: [`Observed`], then [`plan`].
#![forbid(unsafe_code)]

mod action;
mod fact;
mod failed_imports;
mod intent;
mod node_health;
mod observed;
mod plan;
mod retention;
#[cfg(test)]
mod sim;
mod volume;

pub use action::{Action, Condition, FailoverUpdate, MigrationUpdate, Plan, Purpose, VmReport};
pub use bascule_crds::{
    DrainPolicy, FailurePolicy, MigrationMode, MigrationPhase, Phase, RunPolicy,
};
pub use fact::{Fact, Moment};
pub use failed_imports::FailedImports;
pub use intent::{Budgets, DiskIntent, ImageSource, Origin, RestartBudget, SpecDigest, VmIntent};
pub use node_health::{NodeHealth, node_health};
pub use observed::{
    Access, FailoverView, ForeignPod, ImportPhase, ImportView, Migration, NodeView, Observed, Peer,
    PlannerMemory, Pod, PodPhase, Process, Reported, ReservationRecord, ReservationRefusal,
    RowView, SavedView, Stream, VolumeView,
};
pub use plan::plan;
pub use retention::{ClosedRecord, RECORDS_KEPT, RecordKind, expired};
pub use volume::{
    FormatState, NodeOnVolume, VolumeAction, VolumeIntent, VolumeObserved, VolumePlan,
    VolumeReport, plan_volume,
};
