//! The operator's decisions: plan(intent, observed, now) -> Plan, without I/O.
