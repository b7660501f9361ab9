//! The `VirtualMachine` kind.

mod check;
mod spec;
mod status;

pub use check::{FieldError, mac_address};
pub use spec::{
    Availability, Boot, Cpu, DeletionPolicy, Disk, DrainPolicy, ExistingDisk, FailurePolicy,
    HostFileSource, HttpSource, Interface, MigrationLimits, Placement, RestartLimits, RunPolicy,
    Source, SourceKind, VirtualMachine, VirtualMachineSpec,
};
pub use status::{DiskState, DiskStatus, InterfaceStatus, Ownership, Phase, VirtualMachineStatus};
