//! PID 1 of the lab's guest after the initramfs script: a TCP and UDP server for tests.
//!
//! TCP port 7000, a line per request, answered by the number of the session's request and:
//! `ping` → `pong`; `append` → the number of a new record of the log on the disk, written and flushed;
//! `check` → the number of the last record, after reading the whole log back, and cloud-init's disk, if there is one,
//! from the device; `boots` → how often this disk was booted from; `user-data` → the first line of that file on
//! cloud-init's disk. UDP port 7000 echoes. The serial console gets a numbered tick every `guest.tick_ms`. The power button
//! turns the guest off in an orderly way.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::system::{RebootCommand, reboot};

fn main() {
    if let Err(error) = run() {
        println!("guest: {error:#}");
    }
    // PID 1 must not end.
    loop {
        thread::park();
    }
}

fn run() -> Result<()> {
    let disk = match Disk::open(Path::new("/mnt")) {
        Ok(disk) => Some(disk),
        Err(error) => {
            println!("guest: no disk: {error:#}");
            None
        }
    };
    let disk = Arc::new(Mutex::new(disk));
    let seed = Arc::new(
        Seed::open(Path::new("/seed"))
            .inspect_err(|error| println!("guest: no cloud-init disk: {error:#}"))
            .ok(),
    );
    let cmdline = fs::read_to_string("/proc/cmdline").context("read the command line")?;
    let tick = tick_from(&cmdline);
    spawn("tick", move || tick_for_ever(tick))?;
    for entry in fs::read_dir("/dev/input")
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
    {
        spawn("button", move || wait_for_power_button(&entry.path()))?;
    }
    let echo = UdpSocket::bind(("0.0.0.0", PORT)).context("listen on UDP")?;
    spawn("echo", move || {
        let mut packet = [0; 2048];
        while let Ok((size, from)) = echo.recv_from(&mut packet) {
            // A failed send counts as a lost packet at the client.
            echo.send_to(&packet[..size], from).ok();
        }
    })?;
    let listener = TcpListener::bind(("0.0.0.0", PORT)).context("listen on TCP")?;
    println!("guest: ready");
    for stream in listener.incoming() {
        let stream = stream.context("accept")?;
        let (disk, seed) = (Arc::clone(&disk), Arc::clone(&seed));
        spawn("session", move || {
            if let Err(error) = serve(&stream, &disk, seed.as_ref().as_ref()) {
                println!("guest: session: {error:#}");
            }
        })?;
    }
    Ok(())
}

fn serve(stream: &TcpStream, disk: &Mutex<Option<Disk>>, seed: Option<&Seed>) -> Result<()> {
    stream.set_nodelay(true).context("send at once")?;
    let mut out = stream;
    for (count, line) in (1_u64..).zip(BufReader::new(stream).lines()) {
        let answer = match perform(line.context("read")?.trim(), disk, seed) {
            Ok(answer) => answer,
            Err(error) => format!("error: {error:#}"),
        };
        out.write_all(format!("{count} {answer}\n").as_bytes())
            .context("answer")?;
    }
    Ok(())
}

fn perform(request: &str, disk: &Mutex<Option<Disk>>, seed: Option<&Seed>) -> Result<String> {
    match request {
        "ping" => return Ok("pong".to_owned()),
        "user-data" => {
            return seed
                .context("this guest has no cloud-init disk")?
                .first_line();
        }
        "check" => seed.map_or(Ok(()), Seed::check)?,
        _ => {}
    }
    let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
    let disk = disk.as_mut().context("this guest has no disk")?;
    match request {
        "append" => disk.append(),
        "check" => disk.check(),
        "boots" => Ok(disk.boots),
        _ => bail!("unknown request"),
    }
    .map(|number| number.to_string())
}

/// Cloud-init's disk, mounted.
struct Seed {
    user_data: PathBuf,
    /// The file's contents when this guest booted.
    at_boot: Vec<u8>,
}

impl Seed {
    fn open(dir: &Path) -> Result<Self> {
        let user_data = dir.join("user-data");
        let at_boot = fs::read(&user_data).context("read user-data")?;
        Ok(Self { user_data, at_boot })
    }

    fn first_line(&self) -> Result<String> {
        let text = str::from_utf8(&self.at_boot).context("user-data is no text")?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    /// The device still holds what it held at boot.
    fn check(&self) -> Result<()> {
        // Or the page cache would answer, which moves with the guest's memory.
        fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache")?;
        let now = fs::read(&self.user_data).context("read user-data again")?;
        ensure!(now == self.at_boot, "cloud-init's disk has changed");
        Ok(())
    }
}

/// The log: one record of [`RECORD_BYTES`] per number, from 1.
struct Disk {
    log: File,
    last: u64,
    boots: u64,
}

impl Disk {
    fn open(dir: &Path) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/mounts").context("read the mounts")?;
        ensure!(mounts.contains(" /mnt ext4 "), "nothing is mounted");
        Self::open_dir(dir)
    }

    fn open_dir(dir: &Path) -> Result<Self> {
        let boots_file = dir.join("boots");
        let boots = fs::read_to_string(&boots_file)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let boots = boots.unwrap_or(0) + 1;
        fs::write(&boots_file, format!("{boots}\n")).context("count this boot")?;
        let log = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join("log"))
            .context("open the log")?;
        let mut disk = Self {
            log,
            last: 0,
            boots,
        };
        disk.last = disk.check()?;
        // What came after the last whole record was never acknowledged.
        disk.log
            .set_len(disk.last * RECORD_BYTES)
            .context("cut the log")?;
        disk.log.sync_all().context("flush the log")?;
        Ok(disk)
    }

    fn append(&mut self) -> Result<u64> {
        let next = self.last + 1;
        self.log
            .seek(SeekFrom::Start(self.last * RECORD_BYTES))
            .context("seek")?;
        self.log
            .write_all(record(next).as_bytes())
            .context("write")?;
        self.log.sync_data().context("flush")?;
        self.last = next;
        Ok(next)
    }

    /// Reads everything; a record that is not what it should be is an error unless nothing follows it.
    fn check(&mut self) -> Result<u64> {
        let mut bytes = Vec::new();
        self.log.seek(SeekFrom::Start(0)).context("seek")?;
        self.log.read_to_end(&mut bytes).context("read")?;
        let size = usize::try_from(RECORD_BYTES).context("record size")?;
        let mut last = 0;
        for chunk in bytes.chunks(size) {
            if chunk != record(last + 1).as_bytes() {
                let end = last * RECORD_BYTES + RECORD_BYTES;
                let length = bytes.len() as u64;
                ensure!(
                    length <= end,
                    "record {} is bad and {length} bytes are there",
                    last + 1
                );
                break;
            }
            last += 1;
        }
        Ok(last)
    }
}

fn record(number: u64) -> String {
    format!(
        "{number:020} {:010}\n",
        number.wrapping_mul(2_654_435_761) % 10_000_000_000
    )
}

/// Of [`record`].
const RECORD_BYTES: u64 = 32;

fn tick_from(cmdline: &str) -> Duration {
    let given = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("guest.tick_ms="));
    Duration::from_millis(
        given
            .and_then(|text| text.parse().ok())
            .unwrap_or(TICK_MS_DEFAULT),
    )
}

fn tick_for_ever(period: Duration) {
    let start = Instant::now();
    for number in 1_u64.. {
        println!("tick {number} {}", start.elapsed().as_millis());
        thread::sleep(period);
    }
}

/// Reads `struct input_event` (24 bytes on 64 bits: time, type at 16, code at 18, value at 20).
fn wait_for_power_button(device: &Path) {
    let Ok(mut device) = File::open(device) else {
        return;
    };
    let mut event = [0; 24];
    while device.read_exact(&mut event).is_ok() {
        let [.., kind, _, code, _, value, _, _, _] = event;
        if (kind, code, value) == (EV_KEY, KEY_POWER, 1) {
            println!("guest: power button");
            rustix::fs::sync();
            if let Err(error) = reboot(RebootCommand::PowerOff) {
                println!("guest: power off: {error}");
            }
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
    thread
        .map(drop)
        .with_context(|| format!("start the {name} thread"))
}

/// TCP and UDP.
const PORT: u16 = 7000;
/// Cheap enough for an emulated machine.
const TICK_MS_DEFAULT: u64 = 100;
/// linux/input-event-codes.h
const EV_KEY: u8 = 1;
/// linux/input-event-codes.h
const KEY_POWER: u8 = 116;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_goes_on_after_a_torn_record_and_keeps_every_acknowledged_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = Disk::open_dir(dir.path()).unwrap();
        assert_eq!((disk.append().unwrap(), disk.append().unwrap()), (1, 2));
        disk.log.seek(SeekFrom::End(0)).unwrap();
        disk.log.write_all(b"0000000").unwrap();
        let mut disk = Disk::open_dir(dir.path()).unwrap();
        assert_eq!((disk.last, disk.boots), (2, 2));
        assert_eq!(disk.append().unwrap(), 3);
        assert_eq!(disk.check().unwrap(), 3);
    }

    #[test]
    fn a_bad_record_with_good_ones_behind_it_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = Disk::open_dir(dir.path()).unwrap();
        (1..=3).for_each(|number| assert_eq!(disk.append().unwrap(), number));
        disk.log.seek(SeekFrom::Start(RECORD_BYTES)).unwrap();
        disk.log.write_all(b"x").unwrap();
        assert!(disk.check().unwrap_err().to_string().contains("record 2"));
    }

    #[test]
    fn a_record_has_its_size_whatever_its_number() {
        for number in [1, 10_000_000, u64::MAX] {
            assert_eq!(record(number).len() as u64, RECORD_BYTES);
        }
    }
}
