//! The I/O gate: the shared page in which a node's lease expiry is published, and the check each write passes.
