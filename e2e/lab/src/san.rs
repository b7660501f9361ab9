//! The lab's SAN: an iSCSI target outside of all nodes, which records every write that reaches its disk.
//!
//! A node of the emulated tier logs in over two portals, two paths to one disk, and stacks `dm-multipath` and `dm-linear`
//! on them (`san/initiator.rs`). The SAN is the judge of storage scenarios: it knows which node's write landed when, whatever
//! became of the node, and it can hold a node's writes back that have reached it already.
//!
//! ```text
//!   n1: /dev/disk/by-id/lab-san ─ dm-linear ─ dm-multipath ─┬─ sda ── session 1 ── 10.90.0.1:3260 ─┐
//!                                                           └─ sdb ── session 2 ── 10.90.0.1:3261 ─┴─ lab san ── san.img
//! ```
//!
//! # Files, in the lab's directory
//! `disks/san.img`: the disk · `san.hold`: a line `NODE FIRST END` per range of bytes whose writes from that node are held;
//! rewritten by tests, read before a write lands. Among the logs: `san.writes`, a line per write after it has landed:
//! ```text
//!   NODE RECEIVED LANDED OFFSET BYTES        (times: microseconds since 1970)
//!   NODE RECEIVED held OFFSET BYTES          (a write that is held; once it has landed, its line follows)
//! ```
//!
//! # Assumes
//! One host: the times of different nodes' writes are of one clock.

mod connection;
mod initiator;
mod pdu;
mod scsi;
mod session;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::addresses::Family;
use crate::command::named_thread;
pub use initiator::SAN_DEVICE;
pub(crate) use initiator::{SERVICE, service_argv};
use session::Sessions;

/// A path to the SAN's disk: a portal of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variant names say all")]
pub enum SanPath {
    A,
    B,
}

impl SanPath {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    pub(crate) fn port(self) -> u16 {
        match self {
            Self::A => 3260,
            Self::B => 3261,
        }
    }

    /// Target portal group.
    pub(super) fn group(self) -> u16 {
        self.port() - 3259
    }
}

/// A write that has landed on the SAN's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SanWrite {
    /// The node that it came from.
    pub node: String,
    /// When the SAN had received all of it.
    pub received: SystemTime,
    /// When it was on the disk.
    pub landed: SystemTime,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u64,
}

/// The SAN's disk in the lab's directory of disks.
pub(crate) fn disk(disks: &Path) -> PathBuf {
    disks.join("san.img")
}

/// Arguments of `lab san` after the subcommand, given the lab's directories.
pub(crate) fn args(dir: &Path, disks: &Path, logs: &Path) -> Vec<String> {
    vec![
        format!("--disk={}", disk(disks).display()),
        format!("--hold={}", dir.join(HOLD).display()),
        format!("--writes={}", logs.join(WRITES).display()),
    ]
}

/// What `lab san` does; it returns only with an error.
pub fn serve(image: &Path, hold: &Path, writes: &Path) -> Result<()> {
    let disk = Arc::new(Disk::open(image, hold, writes)?);
    let sessions = Arc::new(Sessions::default());
    let [first, second] = SanPath::ALL.map(|path| {
        let address = (Family::V4.hub(), path.port());
        TcpListener::bind(address).with_context(|| format!("listen on {address:?}"))
    });
    let (first, second) = (first?, second?);
    let (other_disk, other_sessions) = (Arc::clone(&disk), Arc::clone(&sessions));
    named_thread("portal", move || {
        accept(&second, SanPath::B, &other_disk, &other_sessions);
    })?;
    accept(&first, SanPath::A, &disk, &sessions);
    Ok(())
}

fn accept(listener: &TcpListener, path: SanPath, disk: &Arc<Disk>, sessions: &Arc<Sessions>) {
    for stream in listener.incoming().filter_map(Result::ok) {
        let (disk, sessions) = (Arc::clone(disk), Arc::clone(sessions));
        let started = named_thread("initiator", move || {
            if let Err(error) = connection::serve(stream, path, &disk, &sessions) {
                eprintln!("{path:?}: {error:#}");
            }
        });
        if let Err(error) = started {
            eprintln!("{error:#}");
        }
    }
}

/// The disk, and the record of its writes.
#[derive(Debug)]
struct Disk {
    file: File,
    writes: File,
    hold: PathBuf,
    bytes: u64,
}

impl Disk {
    fn open(image: &Path, hold: &Path, writes: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(image)
            .with_context(|| format!("open {}", image.display()))?;
        file.set_len(DISK_BYTES).context("size the SAN's disk")?;
        let log = OpenOptions::new().create(true).append(true).open(writes);
        Ok(Self {
            file,
            writes: log.with_context(|| format!("open {}", writes.display()))?,
            hold: hold.to_owned(),
            bytes: DISK_BYTES,
        })
    }

    /// Whether a write is to be held now.
    fn holds(&self, node: &str, offset: u64, bytes: usize) -> bool {
        let end = offset + bytes as u64;
        let Ok(text) = fs::read_to_string(&self.hold) else {
            return false;
        };
        text.lines().any(|line| {
            let mut words = line.split(' ');
            let of_node = words.next() == Some(node);
            let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
            let (first, last) = (number(), number());
            of_node && first.is_some_and(|first| first < end) && last.is_some_and(|l| offset < l)
        })
    }

    /// Lands a write and records it. The image is on the host, which does not crash with a node: no flush is needed.
    fn land(&self, node: &str, received: SystemTime, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, offset).context("write")?;
        let landed = micros(SystemTime::now()).to_string();
        self.record(node, received, &landed, offset, data.len())
    }

    fn record(
        &self,
        node: &str,
        received: SystemTime,
        landed: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<()> {
        let received = micros(received);
        let line = format!("{node} {received} {landed} {offset} {bytes}\n");
        (&self.writes)
            .write_all(line.as_bytes())
            .context("record a write")
    }

    fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; bytes];
        self.file.read_exact_at(&mut data, offset).context("read")?;
        Ok(data)
    }
}

fn micros(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_micros()
}

/// The write that a line of the record names, if it has landed.
pub(crate) fn parse(line: &str) -> Option<SanWrite> {
    let mut words = line.split(' ');
    let node = words.next()?.to_owned();
    let mut number = || words.next()?.parse::<u64>().ok();
    let time = |micros: u64| UNIX_EPOCH + Duration::from_micros(micros);
    Some(SanWrite {
        node,
        received: time(number()?),
        landed: time(number()?),
        offset: number()?,
        bytes: number()?,
    })
}

/// Sparse; room for a few small guests.
const DISK_BYTES: u64 = 4 << 30;
/// The record of writes, among the logs.
pub(crate) const WRITES: &str = "san.writes";
/// The ranges to hold, in the lab's directory.
pub(crate) const HOLD: &str = "san.hold";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_has_landed_is_on_record_and_a_held_range_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let (hold, writes) = (dir.path().join("hold"), dir.path().join("writes"));
        let disk = Disk::open(&dir.path().join("img"), &hold, &writes).unwrap();
        let received = UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001);
        disk.land("n1", received, 4096, &[7; 512]).unwrap();
        assert_eq!(disk.read(4096, 512).unwrap(), [7; 512]);
        let line = fs::read_to_string(&writes).unwrap();
        let write = parse(line.trim_end()).unwrap();
        assert_eq!((write.offset, write.bytes), (4096, 512));
        assert!(write.received == received && write.landed > received);

        assert!(!disk.holds("n1", 4096, 512));
        fs::write(&hold, "n1 8192 12288\n").unwrap();
        assert!(disk.holds("n1", 8192, 1) && disk.holds("n1", 4096, 4097));
        assert!(!disk.holds("n1", 12288, 512) && !disk.holds("n1", 4096, 4096));
        assert!(!disk.holds("n2", 8192, 512));
    }
}
