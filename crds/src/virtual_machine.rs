//! The `VirtualMachine` kind.

mod check;
mod cloud_init;
mod spec;
mod status;

pub use check::{FieldError, mac_address, parse_mac};
pub use cloud_init::CloudInit;
pub use spec::{
    Availability, Boot, Cpu, DeletionPolicy, Disk, ExistingDisk, Firmware, HostFileSource,
    HttpSource, Interface, MigrationLimits, Placement, RestartLimits, Source, SourceKind,
    VirtualMachine, VirtualMachineSpec,
};
pub use status::{
    DiskState, DiskStatus, InterfaceStatus, Ownership, ReservationStatus, VirtualMachineStatus,
};
