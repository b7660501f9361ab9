//! The lab: real Kubernetes clusters on one machine, with fault injection.
//!
//! A lab has a control plane, nodes, two networks and a disk that all nodes share. It changes neither the host's network
//! nor its disks, needs root, installs or builds everything else, and leaves only its logs behind, also when the process
//! that brought it up is killed.
//!
//! # Two tiers behind one interface
//! | | [`Tier::Native`] | [`Tier::Emulated`] |
//! |---|---|---|
//! | a node is | network, mount, PID, UTS, IPC and cgroup namespaces of this machine | a QEMU machine |
//! | its PID 1 | `lab node-init`, in the namespaces | `lab node-init`, after a busybox initramfs |
//! | its kernel | the host's | Debian's, 6.12 |
//! | its /dev/kvm | the host's | its own (AMD-V, emulated where nesting does not work) |
//! | its watchdog | none | IPMI, by [`bmc`] outside the machine; or i6300esb |
//! | the cluster is | IPv6-only | IPv4-only |
//! | the shared disk | a loop device | the same raw image in every machine |
//! | a SAN | none | [`san`], on request: iSCSI over two paths, dm-multipath |
//! | power cut | `kill -9` of PID 1 | `kill -9` of QEMU |
//! | frozen | the freezer of the node's cgroup | the freezer of QEMU's cgroup |
//! | two nodes are Ready after | 5 s | 70 s |
//!
//! # Layout
//! ```text
//!   network namespace bl.NAME.hub
//!   ┌──────────────────────────────────────────────────────────────────────────────┐
//!   │ etcd, kube-apiserver, -controller-manager, -scheduler, coredns, lab-web      │
//!   │ mgmt   10.90.0.1/24 ──┬── m-n1 ── eth0 of n1, 10.90.0.11    IPv4 (emulated)  │
//!   │      fd00:90::1/64    │           or fd00:90::b             or IPv6 (native) │
//!   │                       └── m-n2 ── eth0 of n2, 10.90.0.12 or fd00:90::c       │
//!   │ vmbr0  10.91.0.1/24 ──┬── v-n1 ── eth1 of n1, in its bridge vmbr0            │
//!   │                       └── v-n2 ── eth1 of n2, in its bridge vmbr0            │
//!   └──────────────────────────────────────────────────────────────────────────────┘
//!   pods 10.92.N.0/24 or fd00:92:0:N::/64 of node N, routed
//!   Services 10.93.0.0/16 or fd00:93::/108, kube-proxy (nftables) · cluster DNS: the hub
//!   guests 10.91.0.100 and up, by convention
//!   shared disk /dev/disk/by-id/virtio-shared0 on every node
//!   cgroup bascule-lab-NAME, in every hierarchy, holds every process of the lab
//! ```
//!
//! # In a test
//! ```no_run
//! use std::time::Duration;
//!
//! fn scenario() -> anyhow::Result<()> {
//!     // Gone when dropped, and when this process is killed. BASCULE_LAB_IMAGES has Bascule's image.
//!     let lab = bascule_lab::Lab::native(2)?;
//!     lab.install_bascule(&["--set", "operator.replicas=1"])?;
//!     lab.apply("apiVersion: bascule.dev/v1alpha1\nkind: SharedVolume\n# ...\n")?;
//!     let phase = ["get", "vm", "a", "-o", "jsonpath={.status.phase}"];
//!     lab.wait_for("the machine to run", Duration::from_secs(60), || {
//!         let phase = lab.kubectl(&phase)?;
//!         anyhow::ensure!(phase == "Running", "it is {phase:?}");
//!         Ok(())
//!     })?;
//!     lab.node("n1")?.cut()?;
//!     Ok(())
//! }
//! ```
//! Test clients enter the hub's network by [`Lab::connect`], [`hub::Hub::enter`] or [`hub::Hub::run`]; programs on a
//! node run by [`Node::exec`], which does not use the node's network. A failing [`Lab::wait_for`] prints the end of
//! every log; the logs themselves are kept (`lab status` says where).
//!
//! # By hand
//! `lab up --tier emulated --nodes 3 --image bascule.tar`, then `lab install`, `lab kubectl ...`, `lab exec n1 ...`,
//! `lab cut n1`, `lab down`. `lab --help` lists everything.
//!
//! # What is cached
//! `$XDG_CACHE_HOME/bascule` holds the built Kubernetes, containerd, helm, etcd and CoreDNS, the emulated nodes' disk
//! and the guest, each keyed by what it was made from ([`cache`]). `$XDG_STATE_HOME/bascule` holds labs and logs.
//!
//! # Cleaning up
//! Every process is in the lab's cgroups and every namespace is named after the lab: [`down::down()`] finds them by name,
//! so it also removes the remains of a killed run; `up` begins with it. A [`guard`] process takes a test's lab down when
//! the test is killed.
//!
//! Where to start reading: [`lab`], then `up.rs`, [`node`], [`init`].

#![forbid(unsafe_code)]

pub mod addresses;
pub mod audit;
pub mod bmc;
pub mod cache;
pub mod cgroup;
pub mod cli;
pub mod command;
pub mod config;
pub mod control;
pub mod control_plane;
mod dirs;
pub mod down;
mod emulated;
mod emulator;
pub mod faults;
pub mod guard;
pub mod guest;
pub mod guest_disk;
pub mod hub;
pub mod image;
pub mod init;
mod initramfs;
pub mod kept;
pub mod lab;
pub mod names;
mod native;
pub mod node;
mod node_conf;
mod node_image;
pub mod options;
pub mod pki;
pub mod process;
pub mod progress;
pub mod project;
mod qmp;
pub mod san;
pub mod san_faults;
pub mod state;
pub mod tools;
pub mod up;
pub mod wait;
pub mod web;

pub use addresses::Families;
pub use control_plane::Component;
pub use faults::{Network, Side};
pub use lab::Lab;
pub use node::{Node, Service};
pub use options::{Options, Watchdog, images_from_env};
pub use san::{SAN_DEVICE, SanPath, SanWrite};
pub use state::Tier;
pub use wait::{PermanentError, wait_for};
