//! The probe guest under QEMU: the baseline of the benchmarks, and a check of the guest itself.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{Child, Network, Tap, probe, wait_for};

/// Configuration of a QEMU process.
#[derive(Clone, Debug)]
pub struct QemuSpec {
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// The guest's command line.
    pub cmdline: String,
    /// The guest's disk, a raw file.
    pub disk: Option<PathBuf>,
    /// Wait for a migration on this TCP port of the loopback address.
    pub incoming_port: Option<u16>,
}

/// A QEMU process with the probe guest; killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    control: BufReader<UnixStream>,
    serial: PathBuf,
}

/// QEMU's figures of a completed migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QemuMigration {
    /// By QEMU's own measure.
    pub downtime: Duration,
    /// By QEMU's own measure.
    pub total: Duration,
    /// Bytes sent.
    pub bytes: u64,
}

impl Qemu {
    /// Starts QEMU in `network`, with its sockets and its log in `directory`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(
        network: &Network,
        tap: &Tap,
        directory: &Path,
        name: &str,
        spec: &QemuSpec,
    ) -> Result<Self> {
        let serial = directory.join(format!("{name}.serial"));
        let control = directory.join(format!("{name}.qmp"));
        for socket in [&serial, &control] {
            if socket.exists() {
                fs::remove_file(socket).context("remove an old socket")?;
            }
        }
        let mut command = network.command("qemu-system-x86_64");
        command.args("-accel kvm -M q35 -nodefaults -display none".split(' '));
        command.args("-name probe,debug-threads=on".split(' '));
        command.args(["-m", &spec.memory_mib.to_string()]);
        command
            .arg("-kernel")
            .arg(probe::build()?)
            .args(["-append", &spec.cmdline]);
        command.args([
            "-chardev",
            &unix_socket("serial0", &serial),
            "-serial",
            "chardev:serial0",
        ]);
        command.args([
            "-chardev",
            &unix_socket("qmp0", &control),
            "-mon",
            "qmp0,mode=control",
        ]);
        let tap = &tap.name;
        command.args([
            "-netdev",
            &format!("tap,id=n0,ifname={tap},script=no,downscript=no"),
        ]);
        command.args([
            "-device",
            &format!("virtio-net-pci,netdev=n0,mac={MAC},{MODERN}"),
        ]);
        if let Some(disk) = &spec.disk {
            let disk = disk.display();
            let drive = format!("if=none,id=d0,file={disk},format=raw,cache=none");
            command.args(["-drive", &drive]);
            command.args(["-device", &format!("virtio-blk-pci,drive=d0,{MODERN}")]);
        }
        if let Some(port) = spec.incoming_port {
            command.args(["-incoming", &format!("tcp:127.0.0.1:{port}")]);
        }
        let log = directory.join(format!("{name}.log"));
        let mut child = Child::spawn(name, &mut command, &log)?;
        let stream = wait_for("QEMU's control socket", START_TIME, || {
            match child.ended()? {
                Some(status) => {
                    let said = fs::read_to_string(&log).unwrap_or_default();
                    bail!("QEMU ended with {status}: {said}")
                }
                None => Ok(UnixStream::connect(&control).ok()),
            }
        })?;
        stream
            .set_read_timeout(Some(ANSWER_TIME))
            .context("set a time limit")?;
        let mut qemu = Self {
            child,
            control: BufReader::new(stream),
            serial,
        };
        qemu.read().context("read QEMU's greeting")?;
        qemu.call("qmp_capabilities", &json!({}))?;
        Ok(qemu)
    }

    /// The guest's console.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn console(&self) -> Result<UnixStream> {
        UnixStream::connect(&self.serial).context("connect to the console")
    }

    /// The QEMU process, for signals and for waiting on its end.
    pub fn process(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn press_power_button(&mut self) -> Result<()> {
        self.call("system_powerdown", &json!({})).map(drop)
    }

    /// Moves the guest to the QEMU that waits on `port`, and returns when it runs there.
    ///
    /// # Errors
    /// When the migration fails or takes longer than `limit`.
    pub fn migrate(
        &mut self,
        port: u16,
        downtime: Duration,
        limit: Duration,
    ) -> Result<QemuMigration> {
        let parameters = json!({
            "downtime-limit": u64::try_from(downtime.as_millis()).unwrap_or(u64::MAX),
            // No cap; the default is 128 MiB/s.
            "max-bandwidth": 100_000_000_000_u64,
        });
        self.call("migrate-set-parameters", &parameters)?;
        self.call(
            "migrate",
            &json!({ "uri": format!("tcp:127.0.0.1:{port}") }),
        )?;
        wait_for("QEMU's migration", limit, || {
            let info = self.call("query-migrate", &json!({}))?;
            match info["status"].as_str() {
                Some("completed") => Ok(Some(QemuMigration {
                    downtime: millis(&info["downtime"])?,
                    total: millis(&info["total-time"])?,
                    bytes: info["ram"]["transferred"]
                        .as_u64()
                        .context("no byte count")?,
                })),
                Some("failed" | "cancelled") => bail!("QEMU's migration fails: {info}"),
                _ => Ok(None),
            }
        })
    }

    fn call(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": name, "arguments": arguments });
        writeln!(self.control.get_mut(), "{request}").context("send to QEMU")?;
        loop {
            let mut answer = self.read()?;
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            ensure!(
                answer.get("error").is_none(),
                "QEMU refuses {request}: {answer}"
            );
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self
            .control
            .read_line(&mut line)
            .context("read from QEMU")?;
        ensure!(length > 0, "QEMU closed its control socket");
        serde_json::from_str(&line).with_context(|| format!("read {line:?}"))
    }
}

fn unix_socket(id: &str, path: &Path) -> String {
    format!("socket,id={id},path={},server=on,wait=off", path.display())
}

fn millis(value: &Value) -> Result<Duration> {
    value
        .as_u64()
        .map(Duration::from_millis)
        .with_context(|| format!("no time: {value}"))
}

const MODERN: &str = "disable-legacy=on";
const MAC: &str = "52:54:00:77:00:05";
const START_TIME: Duration = Duration::from_secs(10);
const ANSWER_TIME: Duration = Duration::from_secs(10);
