//! The devices of a virtual machine: a PCI bus with virtio devices on it.
//!
//! The VMM (`bascule-vmm`) makes one [`pci::PciRoot`], adds [`pci::PciFunction`]s to it and passes it
//! the guest's port I/O and MMIO accesses. What a device needs from the hypervisor comes in through
//! small traits, so that tests drive every device without KVM: [`interrupt::MsiRouter`] (interrupts
//! to the guest), [`ioeventfd::IoeventfdRegistry`] (queue notifications from the guest) and
//! [`failure::FailureSink`] (reports of a device that cannot continue).
//!
//! Every device has a thread of its own. [`device::Device::pause`] is a handshake with that thread;
//! when it returns, the device does not touch guest memory and has no I/O in flight.
//!
//! # Saved state
//! Device state is small, so all of it is JSON ([`state::DeviceState`]): readable in a debugger and
//! open for added fields. The state of every kind of device has its own version; tests hold the
//! golden bytes of each version.
//!
//! This crate must not know KVM, Kubernetes, sockets between our processes or migration streams.
//! Read next: [`pci`] for the bus, then [`device`] for the life cycle of a device.

pub mod blk;
pub mod console;
pub mod device;
pub mod disk;
pub mod failure;
#[cfg(test)]
mod fuzz_tests;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod guest_ram;
pub mod interrupt;
pub mod ioeventfd;
pub mod net;
pub mod pci;
pub mod rng;
pub mod state;
#[cfg(any(test, feature = "fuzzing"))]
mod testing;
pub mod virtio;

pub use guest_ram::GuestRam;
