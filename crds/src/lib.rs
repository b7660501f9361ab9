//! The `bascule.dev/v1alpha1` API: its four kinds as Rust types, and their
//! CustomResourceDefinitions.
//!
//! The doc comments of the types are what `kubectl explain` prints, so they speak to the people
//! who write these documents. The validation rules are CEL in the schema where the API server can
//! run them; [`VirtualMachineSpec::check`] says the same to those who read a document without an
//! API server (the embedded mode of `bascule-node`).
//!
//! This crate must not know how anything is carried out. Read next: [`VirtualMachineSpec`].

#[cfg(feature = "kinds")]
mod common;
#[cfg(feature = "kinds")]
mod crd;
#[cfg(feature = "kinds")]
mod duration;
#[cfg(feature = "kinds")]
mod failover;
#[cfg(feature = "kinds")]
mod migration;
pub mod names;
mod phase;
mod policy;
#[cfg(feature = "kinds")]
mod quantity;
#[cfg(feature = "kinds")]
mod shared_volume;
#[cfg(feature = "kinds")]
mod virtual_machine;

#[cfg(feature = "kinds")]
pub use common::{Owner, ProofKind, condition_is, set_condition};
#[cfg(feature = "kinds")]
pub use crd::{crds, to_yaml};
#[cfg(feature = "kinds")]
pub use duration::{Duration, DurationError};
#[cfg(feature = "kinds")]
pub use failover::{Failover, FailoverPhase, FailoverSpec, FailoverStatus, FencingProof};
#[cfg(feature = "kinds")]
pub use migration::{
    MigrationProgress, VirtualMachineMigration, VirtualMachineMigrationSpec,
    VirtualMachineMigrationStatus,
};
pub use phase::{MigrationPhase, Phase};
pub use policy::{DrainPolicy, FailurePolicy, MigrationMode, OnError, OnPanic, RunPolicy};
#[cfg(feature = "kinds")]
pub use quantity::{Quantity, QuantityError};
#[cfg(feature = "kinds")]
pub use shared_volume::{
    Backing, BackingDevice, BackingFile, Fencing, FencingMode, Initialize, KeptDisk, NodeAccess,
    NodeAccessState, SharedVolume, SharedVolumeSpec, SharedVolumeStatus, Timing,
    UnclaimedVirtualMachine,
};
#[cfg(feature = "kinds")]
pub use virtual_machine::{
    Availability, Boot, CloudInit, Cpu, DeletionPolicy, Disk, DiskState, DiskStatus, ExistingDisk,
    FieldError, Firmware, GuestOsStatus, GuestStatus, HostFileSource, HttpSource, Interface,
    InterfaceStatus, MigrationLimits, Ownership, Placement, ReservationStatus, RestartLimits,
    SecretKeyRef, Source, SourceKind, TextSource, VirtualMachine, VirtualMachineSpec,
    VirtualMachineStatus, mac_address, parse_mac,
};
