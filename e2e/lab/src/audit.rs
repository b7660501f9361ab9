//! Write audit of the shared disk: node, offset, length and time of each write of the emulated nodes.
//!
//! QEMU traces every write of its block layer with the wall clock of the machine that all nodes run on, so writes of
//! different nodes can be put in order. A line is written before the write is submitted: a write that is not in a
//! trace never reached the disk, and one of a machine that was killed before a moment cannot land after it.
//!
//! ```text
//!   PID@SECONDS.MICROSECONDS:bdrv_open_common bs POINTER filename "PATH" flags 0xN format_name "raw"
//!   PID@SECONDS.MICROSECONDS:bdrv_co_pwritev_part bs POINTER offset BYTES bytes BYTES flags 0xN
//! ```
//! Source: QEMU `block/trace-events`, `docs/devel/tracing.rst` (log backend).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::state::Tier;

/// A write to the shared disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWrite {
    /// The node that it came from.
    pub node: String,
    /// When it was submitted.
    pub at: SystemTime,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u64,
}

impl Lab {
    /// Every write of every node to the shared disk since `since`, in the order of time. Emulated tier only.
    ///
    /// # Errors
    /// When a trace cannot be read, or a machine never opened the disk: an empty audit would prove nothing.
    pub fn disk_writes(&self, since: SystemTime) -> Result<Vec<DiskWrite>> {
        ensure!(
            self.state().tier == Tier::Emulated,
            "a native node's writes are not traced"
        );
        let disk = self.shared_disk();
        let mut writes = Vec::new();
        for entry in fs::read_dir(dir(self.logs())).context("list the traces")? {
            let path = entry.context("list the traces")?.path();
            let node = path.file_stem().unwrap_or_default().to_string_lossy();
            let trace =
                fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let of_machine = parse(&node, &trace, &disk)
                .with_context(|| format!("{} never opened the disk", path.display()))?;
            writes.extend(of_machine.into_iter().filter(|write| write.at >= since));
        }
        writes.sort_by_key(|write| write.at);
        Ok(writes)
    }
}

/// The writes to `disk` in a trace; none if the machine never opened it.
fn parse(node: &str, trace: &str, disk: &Path) -> Option<Vec<DiskWrite>> {
    let disk = format!("filename \"{}\"", disk.display());
    let mut handles = BTreeSet::new();
    let mut writes = Vec::new();
    for line in trace.lines() {
        let Some((at, event, handle, rest)) = split(line) else {
            continue;
        };
        if event == OPEN && rest.contains(&disk) {
            handles.insert(handle);
        } else if event == OPEN {
            // The pointer was reused for another file.
            handles.remove(handle);
        } else if event == WRITE && handles.contains(handle) {
            let mut numbers = rest.split(' ').filter_map(|word| word.parse().ok());
            if let (Some(offset), Some(bytes)) = (numbers.next(), numbers.next()) {
                writes.push(DiskWrite {
                    node: node.to_owned(),
                    at,
                    offset,
                    bytes,
                });
            }
        }
    }
    (trace.contains(&disk)).then_some(writes)
}

/// Time, event, handle and the rest of a line.
fn split(line: &str) -> Option<(SystemTime, &str, &str, &str)> {
    let (_, line) = line.split_once('@')?;
    let (time, line) = line.split_once(':')?;
    let (seconds, micros) = time.split_once('.')?;
    let since =
        Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?);
    let (event, line) = line.split_once(" bs ")?;
    let (handle, rest) = line.split_once(' ')?;
    Some((UNIX_EPOCH + since, event, handle, rest))
}

/// Where the traces of a lab's machines are, among its logs.
pub(crate) fn dir(logs: &Path) -> PathBuf {
    logs.join("writes")
}

const OPEN: &str = "bdrv_open_common";
const WRITE: &str = "bdrv_co_pwritev_part";
/// QEMU trace events to enable.
pub(crate) const EVENTS: [&str; 2] = [OPEN, WRITE];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writes_to_the_shared_disk_count() {
        let trace = "\
7@1700000000.000001:bdrv_open_common bs 0x1 filename \"/d/root.qcow2\" flags 0x1 format_name \"qcow2\"
7@1700000000.000002:bdrv_open_common bs 0x2 filename \"/d/shared0.img\" flags 0x1 format_name \"raw\"
7@1700000001.500000:bdrv_co_pwritev_part bs 0x1 offset 0 bytes 512 flags 0x0
7@1700000001.500001:bdrv_co_pwritev_part bs 0x2 offset 8192 bytes 4096 flags 0x0
a line of something else
7@1700000002.000000:bdrv_open_common bs 0x2 filename \"/d/other.img\" flags 0x1 format_name \"raw\"
7@1700000003.000000:bdrv_co_pwritev_part bs 0x2 offset 0 bytes 512 flags 0x0
";
        let disk = Path::new("/d/shared0.img");
        let write = DiskWrite {
            node: "n1".to_owned(),
            at: UNIX_EPOCH + Duration::from_micros(1_700_000_001_500_001),
            offset: 8192,
            bytes: 4096,
        };
        assert_eq!(parse("n1", trace, disk), Some(vec![write]));
        assert_eq!(parse("n1", trace, Path::new("/d/none")), None);
    }
}
