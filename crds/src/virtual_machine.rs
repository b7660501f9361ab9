//! The `VirtualMachine` kind.

mod check;
mod cloud_init;
mod field_error;
mod label;
mod secret_ref;
mod source;
mod spec;
mod status;

pub use check::{mac_address, parse_mac};
pub use cloud_init::CloudInit;
pub use field_error::FieldError;
pub use secret_ref::{SecretKeyRef, TextSource};
pub use source::{HostFileSource, HttpSource, Source, SourceKind};
pub use spec::{
    Availability, Boot, Cpu, DeletionPolicy, Disk, ExistingDisk, Firmware, Interface,
    MigrationLimits, Placement, RestartLimits, VirtualMachine, VirtualMachineSpec,
};
pub use status::{
    DiskState, DiskStatus, GuestOsStatus, GuestStatus, InterfaceStatus, Ownership,
    ReservationStatus, VirtualMachineStatus,
};
