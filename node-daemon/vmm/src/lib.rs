//! bascule-vm: one process per virtual machine: the KVM guest, its devices, its disk I/O, its
//! migration streams.
//!
//! [`machine`] is the machine as a value: [`VmBuilder`] → [`PausedVm`] ⇄ [`RunningVm`]. [`dirty`] tracks
//! written pages, [`state`] is the saved device state, [`process`] is `bascule-vm` around the machine.
//! [`layout`] is the guest's physical address space.

mod acpi;
mod blob;
pub mod boot;
mod bus;
mod clock;
pub mod console;
mod cpuid;
pub mod dirty;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod guest_agent;
mod guest_end;
mod ioctl;
mod irq;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod migration;
mod pm_timer;
mod power;
pub mod process;
mod pvpanic;
mod rtc;
mod serial;
mod smbios;
pub mod state;
#[cfg(test)]
mod testing;
mod vcpu;

pub use boot::{BootError, BootSource, ImagesError, Initrd, OpenImages};
pub use console::Console;
pub use dirty::{DirtyBitmap, DirtyError, DirtyTracker, KvmDirtyTracker, PAGES_PER_WORD};
pub use guest_end::GuestEnd;
pub use machine::{BuildError, MachineHandle, PausedVm, RestoreError, RunningVm, VmBuilder};
pub use memory::{GuestMemory, MemoryError, PAGE_SIZE};
pub use state::{MachineState, StateError};
