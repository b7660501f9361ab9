//! The host's end of a port.

use std::fmt;
use std::io;
use std::os::fd::RawFd;

/// The host's end of a port. Called on the device's thread: no call may block.
pub trait HostPort: Send + Sync + fmt::Debug {
    /// The descriptor that epoll watches for reading and writing.
    fn raw_fd(&self) -> RawFd;

    /// Reads bytes for the guest. Returns their number; 0 when none will come any more.
    ///
    /// # Errors
    /// `WouldBlock` when there are none now; another error when the host's end is broken.
    fn receive(&self, data: &mut [u8]) -> io::Result<usize>;

    /// Takes bytes of the guest. Returns how many, which may be fewer than there are.
    ///
    /// # Errors
    /// `WouldBlock` when none are taken now; another error when the host's end is broken: the bytes are dropped.
    fn send(&self, data: &[u8]) -> io::Result<usize>;

    /// A program in the guest has opened the port, or closed it. Also called, with what is the case, whenever the
    /// device begins to run: a guest that has come from another node may have the port open already.
    fn guest_opened(&self, open: bool);
}
