//! The node's processes: starts them so that they outlive the daemon, finds them again, and talks to
//! them.
//!
//! | file | what it is |
//! |---|---|
//! | `supervisor.rs` | the one value that every command works on |
//! | `launcher.rs` | starts a process outside the daemon's container, cgroup and session |
//! | `cgroups.rs` | the processes' cgroups, and their shares of CPU time and memory |
//! | `calls.rs` | requests over the processes' unix sockets |
//! | `locks.rs` | one command at a time for a VM, and for the volumes |
//! | `vm_start.rs`, `undo.rs` | the steps of a VM's start, and their undo when one fails |
//! | `vms.rs`, `volumes.rs`, `imports.rs` | `bascule-vm`, `bascule-volume`, `bascule-import` |
//! | `vm_reports.rs` | the processes' reports, or the files that they have left |
//! | `tap.rs`, `reservation.rs` | a VM's tap devices; its reservation pod's hold process |
//! | `users.rs` | a VM's user |
//! | `huge_pages.rs` | the kernel's setting for guests' RAM |
//! | `console_logs.rs` | the VMs' last serial output |
//! | `restart_backoff.rs` | when a volume process that has ended is started again |

pub(crate) mod calls;
pub(crate) mod cgroups;
mod console_logs;
pub(crate) mod huge_pages;
pub(crate) mod imports;
pub(crate) mod launcher;
pub(crate) mod locks;
pub(crate) mod reservation;
pub(crate) mod restart_backoff;
pub(crate) mod supervisor;
pub(crate) mod tap;
mod undo;
mod users;
pub(crate) mod vm_reports;
mod vm_start;
pub(crate) mod vms;
pub(crate) mod volumes;
