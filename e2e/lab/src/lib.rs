//! The lab: real Kubernetes clusters on one machine, with faults to order.

#![forbid(unsafe_code)]

pub mod bmc;
pub mod cache;
pub mod cgroup;
pub mod cli;
pub mod command;
pub mod config;
pub mod control;
pub mod control_plane;
mod emulated;
pub mod faults;
pub mod guard;
pub mod guest;
pub mod hub;
pub mod image;
pub mod init;
mod initramfs;
pub mod lab;
mod machine;
pub mod names;
mod native;
pub mod node;
mod node_image;
pub mod pki;
pub mod process;
pub mod progress;
pub mod state;
pub mod tools;
pub mod wait;
pub mod web;

pub use control_plane::Component;
pub use faults::{Network, Side};
pub use lab::{Lab, Options, Watchdog};
pub use node::{Node, Service};
pub use state::Tier;
pub use wait::{Hopeless, wait_for};
