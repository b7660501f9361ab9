//! The lab: real Kubernetes clusters on one machine, with faults to order.
