//! One process per attached SharedVolume: heartbeat, fencing, coordinator; and the offline tools format and check.

fn main() {}
