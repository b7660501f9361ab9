//! The guest of the emulated tier: an unmodified Debian kernel (the cloud flavour) and a busybox initramfs whose
//! init executes `guest-agentlet`, the server that tests talk to.
//!
//! Kernel command line: `guest.ip=10.91.0.100/24` (needed for the network), `guest.tick_ms=100`. The first disk is
//! formatted (ext4) only when it is blank. What the agentlet answers is in
//! `src/bin/guest-agentlet.rs`; [`GuestSession`] speaks to it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use sha2::{Digest, Sha256};

use crate::cache::cached;
use crate::command::Run;
use crate::image::{hex, sha256_file};
use crate::initramfs::Initramfs;
use crate::lab::Lab;
use crate::tools::{lab_binary, require_static};
use crate::web::Source;

/// Kernel and initramfs of the lab's guest.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct GuestImage {
    /// Debian's kernel, as packaged.
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl GuestImage {
    /// Finds it in the cache, or makes it: a download of 27 MB and a few seconds.
    pub fn ensure() -> Result<Self> {
        let agentlet = lab_binary()?.with_file_name("guest-agentlet");
        require_static(&agentlet)?;
        let package = kernel_package()?;
        let mut recipe = Sha256::new();
        recipe.update(INIT);
        recipe.update(MODULES.join(","));
        recipe.update(sha256_file(&agentlet)?.0);
        let key = format!("guest-{package}-{}", &hex(&recipe.finalize())[..12]);
        let what = format!("making the guest from {package}");
        let dir = cached(&key, &what, |dir| build(dir, &package, &agentlet))?;
        Ok(Self {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd"),
        })
    }
}

/// What a VirtualMachine boots, as its specification wants it.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct GuestSources {
    pub kernel: Source,
    pub initrd: Source,
}

impl Lab {
    /// Publishes the lab's guest on the web server.
    pub fn publish_guest(&self) -> Result<GuestSources> {
        let image = GuestImage::ensure()?;
        Ok(GuestSources {
            kernel: self.publish("guest-vmlinuz", &image.kernel)?,
            initrd: self.publish("guest-initrd", &image.initrd)?,
        })
    }

    /// A session with the agentlet in the guest that has this address.
    pub fn guest_session(&self, guest: Ipv4Addr, timeout: Duration) -> Result<GuestSession> {
        let stream = self.connect(SocketAddr::from((guest, AGENTLET_PORT)), timeout)?;
        GuestSession::new(stream, timeout)
    }
}

/// A TCP session with a guest's agentlet. It survives a migration of the guest; a restarted guest resets the
/// connection.
#[derive(Debug)]
pub struct GuestSession {
    stream: BufReader<TcpStream>,
    count: u64,
}

impl GuestSession {
    /// Speaks over this connection; each answer may take `timeout`.
    pub fn new(stream: TcpStream, timeout: Duration) -> Result<Self> {
        stream
            .set_read_timeout(Some(timeout))
            .context("set a deadline")?;
        stream.set_nodelay(true).context("send at once")?;
        Ok(Self {
            stream: BufReader::new(stream),
            count: 0,
        })
    }

    /// One round trip. The guest counts the requests of this session, and its count must be ours.
    pub fn ping(&mut self) -> Result<()> {
        self.ask("ping").map(drop)
    }

    /// Appends a record to the guest's log and returns its number: it is on the guest's disk, flushed.
    pub fn append(&mut self) -> Result<u64> {
        number(&self.ask("append")?)
    }

    /// Has the guest read its whole log back, and returns the number of its last record.
    pub fn check(&mut self) -> Result<u64> {
        number(&self.ask("check")?)
    }

    /// How often this guest's disk was booted from.
    pub fn boots(&mut self) -> Result<u64> {
        number(&self.ask("boots")?)
    }

    /// The first line of the user data on the guest's cloud-init disk.
    pub fn user_data(&mut self) -> Result<String> {
        self.ask("user-data")
    }

    fn ask(&mut self, request: &str) -> Result<String> {
        let stream = self.stream.get_mut();
        writeln!(stream, "{request}").with_context(|| format!("ask the guest to {request}"))?;
        let mut answer = String::new();
        self.stream
            .read_line(&mut answer)
            .with_context(|| format!("wait for {request}"))?;
        self.count += 1;
        let answer = answer.trim_end();
        let (count, words) = answer
            .split_once(' ')
            .with_context(|| format!("guest: {answer:?}"))?;
        ensure!(
            count == self.count.to_string(),
            "the guest counts {count}, we {}",
            self.count
        );
        match words.strip_prefix("error: ") {
            Some(error) => Err(anyhow!("guest: {error}")),
            None => Ok(words.to_owned()),
        }
    }
}

fn number(answer: &str) -> Result<u64> {
    answer.parse().with_context(|| format!("guest: {answer:?}"))
}

/// The package that the cloud kernel's metapackage stands for on this machine's release.
fn kernel_package() -> Result<String> {
    let depends = Run::new("apt-cache")
        .args(["depends", "linux-image-cloud-amd64"])
        .text()?;
    parse_depends(&depends).context("apt knows no cloud kernel: run apt-get update")
}

fn parse_depends(depends: &str) -> Option<String> {
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "));
    package
        .filter(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
}

fn build(dir: &Path, package: &str, agentlet: &Path) -> Result<()> {
    let staging = dir.join("staging");
    let (root, initramfs) = (staging.join("root"), staging.join("initramfs"));
    fs::create_dir_all(&root).context("make the staging directory")?;
    Run::new("apt-get")
        .args(["download", package])
        .dir(&staging)
        .deadline(Duration::from_secs(600))
        .done()?;
    let script = "dpkg -x ./*.deb root";
    Run::new("sh").args(["-c", script]).dir(&staging).done()?;
    let version = package.trim_start_matches("linux-image-");
    Run::new("depmod")
        .arg("-b")
        .arg(&root)
        .arg(version)
        .done()?;
    fs::copy(
        root.join("boot").join(format!("vmlinuz-{version}")),
        dir.join("vmlinuz"),
    )
    .context("copy the kernel")?;
    let modules_dir = root.join("lib/modules").join(version);
    let programs = [agentlet, Path::new("/sbin/mke2fs")];
    let archive = Initramfs {
        init: INIT,
        modules_dir: &modules_dir,
        modules: MODULES,
        programs: &programs,
    };
    archive.write(&initramfs, &dir.join("initrd"))?;
    fs::remove_dir_all(&staging).context("remove the staging directory")
}

/// TCP and UDP port of the agentlet.
pub const AGENTLET_PORT: u16 = 7000;

const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "button",
    "evdev",
    "ext4",
    "vfat",
    "nls_cp437",
    "nls_ascii",
];

const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
ip link set lo up
for word in $(cat /proc/cmdline); do
    case "$word" in
        guest.ip=*) ip link set eth0 up; ip addr add "${word#guest.ip=}" dev eth0 ;;
    esac
done
if [ -b /dev/vda ]; then
    if [ "$(dd if=/dev/vda bs=1 skip=1080 count=2 2>/dev/null | hexdump -e '"%02x"')" = ef53 ]; then
        echo "guest: the disk has a file system"
    else
        echo "guest: making a file system"
        /sbin/mke2fs -q -F -t ext4 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard /dev/vda
    fi
    mount -t ext4 -o errors=panic /dev/vda /mnt || echo "guest: the disk cannot be mounted"
fi
if seed=$(findfs LABEL=CIDATA); then
    mkdir /seed
    mount -t vfat -o ro "$seed" /seed || echo "guest: the cloud-init disk cannot be mounted"
fi
exec /sbin/guest-agentlet
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_package_is_found_from_the_metapackage() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(
            parse_depends(depends).unwrap(),
            "linux-image-6.1.0-56-cloud-amd64"
        );
        assert_eq!(parse_depends("linux-image-cloud-amd64\n"), None);
    }

    #[test]
    fn a_guest_that_forgot_the_session_is_found_out() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = crate::command::named_thread("guest", move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in ["1 pong\n", "1 pong\n", "3 error: no disk\n"] {
                requests.next().unwrap().unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        server.unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let mut session = GuestSession::new(stream, Duration::from_secs(5)).unwrap();
        session.ping().unwrap();
        let forgot = session.ping().unwrap_err().to_string();
        assert!(forgot.contains("counts 1"), "{forgot}");
        assert!(
            session
                .append()
                .unwrap_err()
                .to_string()
                .contains("no disk")
        );
    }
}
