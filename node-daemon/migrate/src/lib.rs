//! Live migration: wire format and the state machines of both sides. Pure.
