//! The coordinator: the one node of a volume that decides and journals metadata changes.
//!
//! [`election`] runs the thread that stands for election when the volume has no live coordinator;
//! [`term`] serves requests from a won election until this node is deposed, its lease lapses or its
//! I/O fails.

use crate::block_device::Handle;
use crate::write_ledger::RecordedStore;

pub mod election;
pub mod term;

/// The coordinator thread's access to the device.
pub type Store = RecordedStore<Handle>;
