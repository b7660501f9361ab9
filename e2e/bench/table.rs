//! Printing.

use std::time::Duration;

use crate::measure::{Load, Outcome};

/// Prints ours beside theirs, with ratios.
pub(crate) fn print(load: Load, ours: &Outcome, theirs: &Outcome) {
    println!("\nlive migration, {load}");
    println!("{:<34}{:>12}{:>12}{:>8}", "", "bascule", "QEMU", "ratio");
    let row = |name: &str, figure: fn(&Outcome) -> f64| {
        let (ours, theirs) = (figure(ours), figure(theirs));
        let ratio = if theirs > 0.0 {
            format!("{:.2}", ours / theirs)
        } else {
            "-".into()
        };
        println!("{name:<34}{ours:>12.1}{theirs:>12.1}{ratio:>8}");
    };
    row("blackout, console ticks (ms)", |outcome| {
        millis(outcome.tick_gap)
    });
    row("blackout, 1 kHz packets (ms)", |outcome| {
        millis(outcome.packet_gap)
    });
    row("packets lost", |outcome| {
        f64::from(u32::try_from(outcome.packets_lost).unwrap_or(0))
    });
    row("downtime by own measure (ms)", |outcome| {
        millis(outcome.downtime)
    });
    row("total (ms)", |outcome| millis(outcome.total));
    row("sent (MiB)", |outcome| {
        f64::from(u32::try_from(outcome.bytes >> 10).unwrap_or(0)) / 1024.0
    });
    row("host CPU beyond guest code (ms)", |outcome| {
        millis(outcome.cpu)
    });
    if let Some(kib) = ours.resident_kib {
        let mib = f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0;
        println!("{:<34}{mib:>12.1}", "bascule-vm beyond guest RAM (MiB)");
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
