//! End-to-end scenarios and benchmarks.
