//! Fixtures of the end-to-end tests and benchmarks: the probe guest, a private network, virtual
//! machines under `bascule-vm` and under QEMU, and watchers that observe a guest as its clients do.
//!
//! A test starts with a [`Network`], boots a guest on it, watches it with a [`Console`], a
//! [`Session`] and a [`Flow`], does something to it, and asserts on what the watchers saw. Dropping
//! the values removes every process, namespace and file that they made.
//!
//! Read next: `watch.rs` (observation), `vm.rs` (`bascule-vm`), `qemu.rs` (the baseline).
#![forbid(unsafe_code)]

mod binaries;
mod cluster;
mod disk_image;
mod embedded;
mod hanging;
mod hostile;
pub mod kubernetes;
mod kvm;
mod migration;
mod network;
pub mod probe;
mod process;
mod qemu;
mod vm;
mod wait;
mod watch;

pub use binaries::binary;
pub use cluster::{TestCluster, TestNode, VmOnVolume};
pub use disk_image::{ImagePacking, numbered_disk, pack};
pub use embedded::{EmbeddedHost, EmbeddedHosts, RunningCommand};
pub use hanging::{HangGuard, HangingDisk};
pub use hostile::{HostileGuest, Tally};
pub use kvm::kvm_or_skip;
pub use migration::{MovableGuest, TwoNodes};
pub use network::{GATEWAY, GUEST, Network, Tap};
pub use process::{Child, CpuMeter};
pub use qemu::{Qemu, QemuMigration, QemuSpec};
pub use vm::{TestVm, TestVmSpec};
pub use wait::wait_for;
pub use watch::{Console, Flow, FlowSummary, Session, Tick};
