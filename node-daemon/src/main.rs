//! bascule-node: supervises a node's VM and volume processes; embedded mode without Kubernetes.

fn main() {}
