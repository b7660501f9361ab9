//! The operator: observes the cluster, plans with bascule-operator-core, executes.

fn main() {}
