//! The leader's loops. Each reconciles one kind of object, or does one periodic job.

pub(crate) mod node_events;
pub(crate) mod record_gc;
pub(crate) mod shared_volumes;
pub(crate) mod virtual_machines;
