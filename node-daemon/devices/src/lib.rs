//! The devices of a virtual machine: a PCI bus with virtio devices on it.
//!
//! The machine (`bascule-vmm`) makes one [`pci::PciRoot`], adds [`pci::PciFunction`]s to it
//! and hands it the guest's port and memory accesses. What a device needs of the hypervisor comes in
//! through small traits, so that every device can be driven by a test without KVM:
//! [`interrupt::MsiRouter`] (interrupts to the guest), [`doorbell::DoorbellRegistry`]
//! (notifications from the guest) and [`failure::FailureSink`] (a device that cannot go on).
//!
//! A device works in a thread of its own. [`device::Device::pause`] is a handshake with that thread;
//! when it returns, the device touches guest memory no more and none of its I/O is in flight.
//!
//! # Saved state
//! Device state is small, so all of it is JSON ([`state::DeviceState`]): readable in a debugger and
//! open for added fields. Every device's state has a kind and a version of its own; tests hold the
//! golden bytes of each version.
//!
//! This crate must not know KVM, Kubernetes, sockets between our processes or migration streams.
//! Read next: [`pci`] for the bus, then [`device`] for the life of a device.

pub mod blk;
pub mod device;
pub mod disk;
pub mod doorbell;
pub mod failure;
#[cfg(test)]
mod hostile;
pub mod interrupt;
pub mod net;
pub mod pci;
pub mod rng;
pub mod state;
#[cfg(test)]
mod testing;
pub mod virtio;

use vm_memory::bitmap::AtomicBitmap;

/// Guest memory as all devices see it: every write through it is tracked in a dirty bitmap.
pub type GuestRam = vm_memory::GuestMemoryMmap<AtomicBitmap>;
