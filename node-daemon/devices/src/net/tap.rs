//! The backend of a network device: a tap, whose frames carry the virtio-net header.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use virtio_bindings::virtio_net::virtio_net_hdr_v1;

/// A source and sink of frames. Each carries a virtio-net header of 12 bytes (5.1.6) in front.
pub trait Tap: Send + Sync + fmt::Debug {
    /// The descriptor that epoll watches for reading and writing.
    fn raw_fd(&self) -> RawFd;

    /// Reads the next frame that the network sent to the guest. Returns its length.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; another error when the tap is down or was deleted.
    fn receive(&self, frame: &mut [u8]) -> io::Result<usize>;

    /// Sends a frame of the guest to the network.
    ///
    /// # Errors
    /// `WouldBlock` when the queue of the tap is full; another error when it refuses the frame.
    fn send(&self, frame: &[u8]) -> io::Result<()>;

    /// Sets the offloads that the guest supports on receive: a combination of the `TUN_F_` flags.
    ///
    /// # Errors
    /// When the tap does not support them.
    fn set_offloads(&self, flags: u32) -> io::Result<()>;
}

/// A tap device of the kernel.
#[derive(Debug)]
pub struct TapFd(File);

impl TapFd {
    /// Uses a tap that another process opened and attached, with `IFF_TAP | IFF_NO_PI |
    /// IFF_VNET_HDR`.
    ///
    /// # Errors
    /// When the descriptor is not such a tap.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let tap = Self(fd.into());
        let (_, flags) = sys::interface(&tap.0)?;
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & wanted != wanted {
            let text = format!(
                "not a tap with virtio-net headers (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR): flags {flags:#x}"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        tap.prepared()
    }

    /// Opens the tap interface `name` of this thread's network namespace; creates it if it does not
    /// exist. The kernel deletes it when this value is dropped, unless it is persistent.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(name: &str) -> io::Result<Self> {
        let options = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        sys::attach(&options, name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)?;
        Self(options).prepared()
    }

    /// Makes the tap interface `name` in this thread's network namespace, if it does not exist, so
    /// that it stays when this process ends. A later [`TapFd::open`] by this user needs no rights on the network: a tap
    /// without an owner needs them on some kernels (Linux 6.12.117 of Debian 13).
    ///
    /// # Errors
    /// When `/dev/net/tun` is missing or the kernel refuses the name.
    pub fn create_persistent(name: &str) -> io::Result<()> {
        let tap = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        sys::attach(&tap, name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)?;
        sys::set_owner(&tap, rustix::process::geteuid().as_raw())?;
        sys::set_persistent(&tap)
    }

    fn prepared(self) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&self.0)?;
        rustix::fs::fcntl_setfl(&self.0, flags | rustix::fs::OFlags::NONBLOCK)?;
        sys::set_header_bytes(&self.0, HEADER_BYTES_INT)?;
        Ok(self)
    }
}

impl Tap for TapFd {
    fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(frame)
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let sent = (&self.0).write(frame)?;
        if sent == frame.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    fn set_offloads(&self, flags: u32) -> io::Result<()> {
        sys::set_offloads(&self.0, flags)
    }
}

/// The ioctls of the tun driver, which no crate wraps.
mod sys {
    #![expect(unsafe_code, reason = "ioctl takes raw addresses")]

    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;

    /// `struct ifreq` as the tun driver uses it.
    #[repr(C)]
    #[derive(Default)]
    struct InterfaceRequest {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }

    pub(super) fn attach(tap: &File, name: &str, flags: u16) -> io::Result<()> {
        let mut request = InterfaceRequest {
            flags,
            ..InterfaceRequest::default()
        };
        // The last byte stays zero: it terminates the name.
        if name.len() >= request.name.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "interface name too long",
            ));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is laid out as (40
        // bytes, asserted below) and which outlives the call.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
        check(result)
    }

    /// The interface's name and flags.
    pub(super) fn interface(tap: &File) -> io::Result<([u8; 16], u16)> {
        let mut request = InterfaceRequest::default();
        // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is laid out as and which outlives
        // the call.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF, &raw mut request) };
        check(result)?;
        Ok((request.name, request.flags))
    }

    pub(super) fn set_persistent(tap: &File) -> io::Result<()> {
        // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory of ours.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, libc::c_ulong::from(1_u32)) })
    }

    pub(super) fn set_owner(tap: &File, user: u32) -> io::Result<()> {
        // SAFETY: TUNSETOWNER takes its argument by value and touches no memory of ours.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOWNER, libc::c_ulong::from(user)) })
    }

    pub(super) fn set_header_bytes(tap: &File, bytes: libc::c_int) -> io::Result<()> {
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) })
    }

    pub(super) fn set_offloads(tap: &File, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    fn check(result: libc::c_int) -> io::Result<()> {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());
    /// `_IOW('T', 202, int)`
    const TUNSETIFF: libc::c_ulong = 0x4004_54CA;
    /// `_IOW('T', 203, int)`
    const TUNSETPERSIST: libc::c_ulong = 0x4004_54CB;
    /// `_IOW('T', 204, int)`
    const TUNSETOWNER: libc::c_ulong = 0x4004_54CC;
    /// `_IOW('T', 208, unsigned int)`
    const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54D0;
    /// `_IOR('T', 210, unsigned int)`
    const TUNGETIFF: libc::c_ulong = 0x8004_54D2;
    /// `_IOW('T', 216, int)`
    const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54D8;
}

/// The virtio-net header, including `num_buffers` (5.1.6: always present in virtio 1).
pub(super) const HEADER_BYTES: usize = size_of::<virtio_net_hdr_v1>();
const HEADER_BYTES_INT: libc::c_int = 12;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// `TUN_F_CSUM`
pub(super) const TUN_F_CSUM: u32 = 1;
/// `TUN_F_TSO4`
pub(super) const TUN_F_TSO4: u32 = 2;
/// `TUN_F_TSO6`
pub(super) const TUN_F_TSO6: u32 = 4;
/// `TUN_F_TSO_ECN`
pub(super) const TUN_F_TSO_ECN: u32 = 8;

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "a test has a network namespace of its own")]

    use std::process::Command;

    use super::*;

    /// Runs `work` in a new network namespace, which ends with the thread.
    fn in_own_network(work: impl FnOnce() + Send + 'static) {
        let thread = std::thread::Builder::new().name("own-network".into());
        let thread = thread.spawn(|| {
            let flags = rustix::thread::UnshareFlags::NEWNET;
            // SAFETY: file descriptors stay shared; only this thread's network changes.
            unsafe { rustix::thread::unshare_unsafe(flags) }.unwrap();
            work();
        });
        thread.unwrap().join().unwrap();
    }

    fn received_packets(tap: &str) -> String {
        let ip = Command::new("ip")
            .args(["-s", "link", "show", tap])
            .output()
            .unwrap();
        let text = String::from_utf8(ip.stdout).unwrap();
        let counts = text.lines().skip_while(|line| !line.contains("RX:")).nth(1);
        counts
            .unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .to_owned()
    }

    /// Whether taps can be made here. Without that a test says so and returns, but fails in CI.
    fn privileged() -> bool {
        let privileged = rustix::process::geteuid().is_root();
        let possible = privileged && std::path::Path::new("/dev/net/tun").exists();
        assert!(
            possible || std::env::var_os("CI").is_none(),
            "CI needs root and /dev/net/tun"
        );
        if !possible {
            eprintln!("skipped: needs root and /dev/net/tun");
        }
        possible
    }

    /// A VM's process has given up its capabilities before it opens its taps.
    #[test]
    fn a_persistent_tap_belongs_to_the_user_who_makes_it() {
        if !privileged() {
            return;
        }
        in_own_network(|| {
            TapFd::create_persistent("bsctest1").unwrap();
            let ip = Command::new("ip")
                .args(["-details", "link", "show", "bsctest1"])
                .output();
            let shown = String::from_utf8(ip.unwrap().stdout).unwrap();
            assert!(shown.contains("persist on user root"), "{shown}");
            TapFd::open("bsctest1").unwrap();
        });
    }

    #[test]
    fn a_real_tap_takes_frames_with_headers_and_offloads() {
        if !privileged() {
            return;
        }
        in_own_network(|| {
            let tap = TapFd::open("bsctest0").unwrap();
            tap.set_offloads(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)
                .unwrap();
            assert_eq!(
                tap.receive(&mut [0; 100]).unwrap_err().kind(),
                io::ErrorKind::WouldBlock
            );
            let mut frame = vec![0; HEADER_BYTES];
            frame.extend([0xFF; 6]);
            frame.extend([2; 54]);
            assert!(tap.send(&frame).is_err(), "the interface is down");
            let up = Command::new("ip")
                .args(["link", "set", "bsctest0", "up"])
                .status();
            assert!(up.unwrap().success());
            tap.send(&frame).unwrap();
            assert_eq!(received_packets("bsctest0"), "1");
            // The kernel sends frames of its own on a new link; they carry the virtio-net header.
            let mut first = vec![0; 2000];
            crate::testing::wait_until(
                "a frame from the kernel",
                || matches!(tap.receive(&mut first), Ok(length) if length > HEADER_BYTES + 14),
            );
            let again = TapFd::from_fd(tap.0.try_clone().unwrap().into()).unwrap();
            again.set_offloads(0).unwrap();
        });
    }

    /// Each refusal was a line in the process's log, whenever the guest set its interface up anew.
    #[test]
    fn virtio_5_1_3_1_no_features_of_a_guest_are_offloads_that_a_real_tap_refuses() {
        use crate::net::config::{F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6};
        use crate::net::queue_handler::offloads;

        if !privileged() {
            return;
        }
        in_own_network(|| {
            let tap = TapFd::open("bsctest2").unwrap();
            let all = [F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN];
            for chosen in 0..16_u32 {
                let bits = all
                    .iter()
                    .zip(0..)
                    .filter(|(_, bit)| (chosen >> bit) & 1 != 0);
                let features = bits.fold(0, |features, (feature, _)| features | feature);
                tap.set_offloads(offloads(features)).unwrap();
            }
            assert_eq!(
                offloads(F_GUEST_CSUM | F_GUEST_TSO6),
                TUN_F_CSUM | TUN_F_TSO6
            );
            let everything = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
            assert_eq!(offloads(u64::MAX), everything);
            tap.set_offloads(TUN_F_TSO4).unwrap_err();
            tap.set_offloads(TUN_F_CSUM | TUN_F_TSO_ECN).unwrap_err();
        });
    }
}
