//! One process per node that owns /dev/watchdog.

fn main() {}
