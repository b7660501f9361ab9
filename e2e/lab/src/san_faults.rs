//! What tests read of the lab's SAN, and how they break a node's paths to it and its device.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use crate::hub::Hub;
use crate::lab::Lab;
use crate::names::{MGMT_BRIDGE, NodeIndex};
use crate::node::Node;
use crate::san::{HOLD, SAN_DEVICE, SanPath, SanWrite, WRITES, disk, parse};
use crate::wait::wait_for;

impl Lab {
    /// The SAN's disk. Emulated tier only.
    #[must_use]
    pub fn san_disk(&self) -> PathBuf {
        disk(&self.paths().disks())
    }

    /// Every write that has landed on the SAN's disk since `since`, in the order of landing.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn san_writes(&self, since: SystemTime) -> Result<Vec<SanWrite>> {
        let text = self.san_record()?;
        let writes = text.lines().filter_map(parse);
        Ok(writes.filter(|write| write.landed >= since).collect())
    }

    /// Number of writes that were held since `since`, whether they have landed or not.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn san_held(&self, since: SystemTime) -> Result<usize> {
        let text = self.san_record()?;
        let held = text.lines().filter(|line| line.contains(" held "));
        let landed = held.filter_map(|line| parse(&line.replace(" held ", " 0 ")));
        Ok(landed.filter(|write| write.received >= since).count())
    }

    fn san_record(&self) -> Result<String> {
        let path = self.logs().join(WRITES);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// Holds writes of `node` to these ranges of bytes (first, end): the SAN receives them, and neither lands nor answers
    /// them before [`Self::san_release`].
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn san_hold(&self, node: &str, ranges: &[(u64, u64)]) -> Result<()> {
        let lines = ranges
            .iter()
            .map(|(first, end)| format!("{node} {first} {end}\n"));
        self.write_holds(&lines.collect::<String>())
    }

    /// Lets all held writes land.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn san_release(&self) -> Result<()> {
        self.write_holds("")
    }

    fn write_holds(&self, text: &str) -> Result<()> {
        let dir = self.paths().dir();
        let new = dir.join("san.hold.new");
        fs::write(&new, text).context("write the SAN's holds")?;
        fs::rename(new, dir.join(HOLD)).context("replace the SAN's holds")
    }
}

impl Lab {
    /// Drops everything between a node and the SAN on these paths, in both directions, until [`Self::heal_san`].
    ///
    /// # Errors
    /// When nftables refuses the rules.
    pub fn cut_san(&self, node: NodeIndex, paths: &[SanPath]) -> Result<()> {
        let rules: String = paths.iter().map(|path| rules(node, *path)).collect();
        let run = self.hub().run("nft").args(["-f", "-"]);
        run.stdin(format!("{TABLE}{rules}")).done()
    }

    /// Ends all of [`Self::cut_san`].
    ///
    /// # Errors
    /// When nftables refuses it.
    pub fn heal_san(&self) -> Result<()> {
        let script = "add table bridge san\ndelete table bridge san\n";
        self.hub().run("nft").args(["-f", "-"]).stdin(script).done()
    }
}

impl Node<'_> {
    /// Has these ranges of bytes (first, end) of the SAN's disk fail on this node with EIO: `dm-error` within the
    /// `dm-linear` above the paths. No range ends it. What was submitted before completes first.
    ///
    /// # Errors
    /// When the device mapper refuses the table.
    pub fn san_errors(&self, ranges: &[(u64, u64)]) -> Result<()> {
        let sectors = self.exec(&["blockdev", "--getsz", SAN_DEVICE])?;
        let sectors = sectors.trim().parse().context("size of the disk")?;
        self.san_table(&table(sectors, ranges)?)
    }

    /// Has every write to the SAN's disk on this node fail with EIO (`dm-flakey`, `error_writes`); reads work.
    ///
    /// # Errors
    /// As [`Self::san_errors`].
    pub fn san_write_errors(&self) -> Result<()> {
        let sectors = self.exec(&["blockdev", "--getsz", SAN_DEVICE])?;
        let sectors = sectors.trim();
        self.exec(&["modprobe", "dm_flakey"])?;
        // Up for no second, down for an hour.
        self.san_table(&format!(
            "0 {sectors} flakey {BELOW} 0 0 3600 1 error_writes\n"
        ))
    }

    /// With multipath over both paths, as after a boot; or on the first path alone, whose requests wait for its session
    /// for 120 s, as open-iscsi has them by default.
    ///
    /// # Errors
    /// As [`Self::san_errors`].
    pub fn set_san_multipath(&self, on: bool) -> Result<()> {
        let (below, patience) = if on { (BELOW, 3) } else { ("/dev/sda", 120) };
        let sectors = self.exec(&["blockdev", "--getsz", SAN_DEVICE])?;
        self.san_table(&format!("0 {} linear {below} 0\n", sectors.trim()))?;
        let set = "for s in /sys/class/iscsi_session/*; do echo $1 > $s/recovery_tmo; done";
        self.exec(&["sh", "-c", set, "sh", &patience.to_string()])
            .map(drop)
    }

    /// Waits until both paths carry requests again.
    ///
    /// # Errors
    /// When one does not in time.
    pub fn wait_san_paths(&self, limit: Duration) -> Result<()> {
        let what = format!("both paths of {} to the SAN", self.name());
        wait_for(&what, limit, || {
            let status = self.exec(&["dmsetup", "status", "san-paths"])?;
            let sessions = "cat /sys/class/iscsi_session/*/state";
            let sessions = self.exec(&["sh", "-c", sessions])?;
            let logged_in = sessions.lines().filter(|line| *line == "LOGGED_IN").count();
            let failed = status.contains(" F ");
            ensure!(!failed && logged_in == 2, "{sessions} {status}");
            Ok(())
        })
    }

    fn san_table(&self, table: &str) -> Result<()> {
        let script = "export DM_DISABLE_UDEV=1; dmsetup reload san && dmsetup suspend --nolockfs san && \
                      dmsetup resume san";
        let argv = ["sh", "-c", script];
        let outcome = self.try_exec(&argv, Some(table), TABLE_DEADLINE)?;
        ensure!(outcome.code == Some(0), "dmsetup: {}", outcome.stderr);
        Ok(())
    }
}

/// The table of the device mapper: linear, with errors in these ranges of bytes.
fn table(sectors: u64, ranges: &[(u64, u64)]) -> Result<String> {
    let mut lines = String::new();
    let mut next = 0;
    let mut add = |first: u64, end: u64, bad: bool| {
        let target = if bad {
            "error".to_owned()
        } else {
            format!("linear {BELOW} {first}")
        };
        if first < end {
            lines.push_str(&format!("{first} {} {target}\n", end - first));
        }
    };
    for (first, end) in ranges {
        let (first, end) = (first / SECTOR_BYTES, end / SECTOR_BYTES);
        ensure!(next <= first && end <= sectors, "ranges out of order");
        add(next, first, false);
        add(first, end, true);
        next = end;
    }
    add(next, sectors, false);
    Ok(lines)
}

/// Both directions of a path.
fn rules(node: NodeIndex, path: SanPath) -> String {
    let (port, cable) = (path.port(), Hub::port(MGMT_BRIDGE, node));
    format!(
        "add rule bridge san input iifname {cable} tcp dport {port} drop\n\
         add rule bridge san output oifname {cable} tcp sport {port} drop\n"
    )
}

/// What is below it.
const BELOW: &str = "/dev/mapper/san-paths";
const SECTOR_BYTES: u64 = 512;
/// A suspension waits for what was submitted.
const TABLE_DEADLINE: Duration = Duration::from_secs(60);
/// Everything here is idempotent.
const TABLE: &str = "\
add table bridge san
add chain bridge san input { type filter hook input priority 0; }
add chain bridge san output { type filter hook output priority 0; }
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_range_is_cut_out_of_the_disk() {
        let whole = "0 1000 linear /dev/mapper/san-paths 0\n";
        assert_eq!(table(1000, &[]).unwrap(), whole);
        let bad = "0 8 linear /dev/mapper/san-paths 0\n8 8 error\n16 984 linear /dev/mapper/san-paths 16\n";
        assert_eq!(table(1000, &[(4096, 8192)]).unwrap(), bad);
        assert!(table(1000, &[(8192, 16384), (0, 4096)]).is_err());
    }

    #[test]
    fn a_cut_path_is_cut_in_both_directions() {
        let rules = rules(NodeIndex::new(2).unwrap(), SanPath::B);
        assert!(rules.contains("iifname m-n2 tcp dport 3261 drop"));
        assert!(rules.contains("oifname m-n2 tcp sport 3261 drop"));
    }
}
