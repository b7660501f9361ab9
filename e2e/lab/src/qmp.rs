//! Client of QEMU's monitor (QMP), for disk faults of an emulated node.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::names::SHARED_DISK;
use crate::wait::wait_for;

/// The monitor of one machine.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to the monitor at this socket.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to the monitor {}", socket.display()))?;
        stream
            .set_read_timeout(Some(ANSWER_DEADLINE))
            .context("set a deadline")?;
        let mut monitor = Self {
            stream: BufReader::new(stream),
        };
        let greeting = monitor.read()?;
        ensure!(greeting.get("QMP").is_some(), "not a monitor: {greeting}");
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes one command; events that come between are skipped.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{request}")
            .with_context(|| format!("ask for {command}"))?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self
            .stream
            .read_line(&mut line)
            .context("read from the monitor")?;
        ensure!(count > 0, "the monitor closed the connection");
        serde_json::from_str(&line).context("parse the reply of the monitor")
    }

    /// Stalls the shared disk, or resumes it with the queued requests.
    pub(crate) fn stall_disk(&mut self, stalled: bool) -> Result<()> {
        // 1 byte/s stalls; 0 means no limit.
        let bps = u8::from(stalled);
        let limits = json!({
            "device": SHARED_DISK, "bps": bps, "bps_rd": 0, "bps_wr": 0,
            "iops": 0, "iops_rd": 0, "iops_wr": 0,
        });
        self.execute("block_set_io_throttle", &limits).map(drop)
    }

    /// Hot-unplugs the shared disk; returns when the guest's kernel has released it.
    pub(crate) fn remove_disk(&mut self) -> Result<()> {
        self.execute("device_del", &json!({"id": DISK_DEVICE}))?;
        wait_for("the node to let its disk go", UNPLUG_DEADLINE, || {
            let disks = self.execute("query-block", &json!({}))?;
            let disks = disks.as_array().context("a list of disks")?;
            ensure!(
                disks.iter().all(|disk| disk["device"] != SHARED_DISK),
                "it is still there"
            );
            Ok(())
        })
    }

    /// Hot-plugs the shared disk again.
    pub(crate) fn return_disk(&mut self, image: &Path) -> Result<()> {
        let drive = format!("drive_add dummy {}", shared_drive(image));
        self.execute("human-monitor-command", &json!({"command-line": drive}))?;
        let device = json!({
            "driver": "virtio-blk-pci", "id": DISK_DEVICE, "bus": DISK_BUS, "drive": SHARED_DISK,
            "serial": SHARED_DISK, "share-rw": true,
        });
        self.execute("device_add", &device).map(drop)
    }
}

/// The drive option of the shared disk.
///
/// `none`: what one node wrote must be what another one reads, and nothing is in the host's page cache.
pub(crate) fn shared_drive(image: &Path) -> String {
    let image: PathBuf = image.to_owned();
    format!(
        "if=none,id={SHARED_DISK},file={},format=raw,cache=none,aio=threads,file.locking=off",
        image.display()
    )
}

/// Device of the shared disk.
pub(crate) const DISK_DEVICE: &str = "disk-shared0";
/// Root port of the shared disk: a device on the root complex itself cannot be hot-unplugged.
pub(crate) const DISK_BUS: &str = "port-shared0";
/// The monitor answers from QEMU's main loop, which a busy machine holds up for a moment.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// PCI Express hot-unplug takes at least 5 s: the time to cancel after a press of the attention button.
const UNPLUG_DEADLINE: Duration = Duration::from_secs(60);
