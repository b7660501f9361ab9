//! The guest's report: one line `stat key=value …`, the same on the console and over TCP.

use core::fmt;
use core::str::FromStr;

macro_rules! report {
    ($($(#[$doc:meta])* $field:ident,)*) => {
        /// Counters since the guest booted.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Report {
            $($(#[$doc])* pub $field: u64,)*
        }

        impl fmt::Display for Report {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("stat")?;
                $(write!(f, concat!(" ", stringify!($field), "={}"), self.$field)?;)*
                Ok(())
            }
        }

        impl FromStr for Report {
            type Err = NotAReport;

            fn from_str(line: &str) -> Result<Self, NotAReport> {
                let mut report = Self::default();
                let mut words = line.split_ascii_whitespace();
                if words.next() != Some("stat") {
                    return Err(NotAReport);
                }
                for word in words {
                    let (key, value) = word.split_once('=').ok_or(NotAReport)?;
                    let value = value.parse().map_err(|_| NotAReport)?;
                    match key {
                        $(stringify!($field) => report.$field = value,)*
                        _ => return Err(NotAReport),
                    }
                }
                Ok(report)
            }
        }
    };
}

report!(
    /// A number that differs from boot to boot.
    boot,
    /// Milliseconds since boot, by the guest's own clock.
    up_ms,
    /// Ticks written to the console.
    ticks,
    /// Longest iteration of the guest's main loop, in microseconds.
    stall_us_max,
    /// Packets echoed over UDP.
    udp,
    /// Lines answered over TCP.
    tcp,
    /// The highest block number whose write and flush the disk acknowledged.
    disk_ack,
    /// Blocks that did not read back as they were written.
    disk_bad,
    /// Disk requests that failed.
    disk_errors,
    /// Last block number on the disk when the guest started.
    disk_start,
    /// Slots that were damaged or missing when the guest started.
    disk_start_bad,
    /// A hash of the disk's serial number, once it was read.
    disk_serial,
    /// How often it was read.
    disk_serial_reads,
    /// How often it was not the one that was read first.
    disk_serial_bad,
    /// Pages rewritten.
    mem_pages,
    /// Pages that did not hold what was written to them.
    mem_bad,
    /// Pages verified without being rewritten.
    mem_checked,
);

/// A line that is no report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAReport;

impl fmt::Display for NotAReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a report of the probe guest")
    }
}

impl core::error::Error for NotAReport {}

impl Report {
    /// Sum of all fault counters; 0 when the guest found no fault.
    #[must_use]
    pub const fn faults(&self) -> u64 {
        self.disk_bad + self.disk_errors + self.disk_start_bad + self.disk_serial_bad + self.mem_bad
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back_from_its_line() {
        let report = Report {
            boot: 1,
            disk_ack: u64::MAX,
            mem_bad: 3,
            ..Report::default()
        };
        let line = report.to_string();
        assert!(line.starts_with("stat boot=1 up_ms=0 "), "{line}");
        assert_eq!(line.parse(), Ok(report));
        assert_eq!(report.faults(), 3);
    }

    #[test]
    fn another_line_is_no_report() {
        for line in ["", "t 1 2", "stat boot", "stat boot=x", "stat colour=1"] {
            assert_eq!(line.parse::<Report>(), Err(NotAReport), "{line}");
        }
    }
}
