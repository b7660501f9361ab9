//! The `VirtualMachine` kind.

mod check;
mod cloud_init;
mod field_error;
mod spec;
mod status;

pub use check::{mac_address, parse_mac};
pub use cloud_init::{CloudInit, SecretKeyRef, TextSource};
pub use field_error::FieldError;
pub use spec::{
    Availability, Boot, Cpu, DeletionPolicy, Disk, ExistingDisk, Firmware, HostFileSource,
    HttpSource, Interface, MigrationLimits, Placement, RestartLimits, Source, SourceKind,
    VirtualMachine, VirtualMachineSpec,
};
pub use status::{
    DiskState, DiskStatus, GuestOsStatus, GuestStatus, InterfaceStatus, Ownership,
    ReservationStatus, VirtualMachineStatus,
};
