//! The proof that a dead process has no request left: a lock that its requests hold.
//!
//! Each writer gets open file descriptions of its own on the device (opened anew, not duplicated), and
//! on each of them, before it is handed over, a lock of the kind that belongs to the description
//! (`F_OFD_SETLK`, fcntl(2)) on one byte that is the writer's. The kernel drops such a lock with the
//! last reference to the description. A descriptor is one, a message that carries one is one, and so
//! is every request in flight, by io_uring or by direct I/O. So a free byte says that no descriptor of
//! the writer is open and none of its requests is in flight, whatever became of its process. That is
//! measured by `i1_a_killed_process_holds_its_lock_until_its_writes_have_completed`.
//!
//! # Assumes
//! - Locks belong to the inode that was opened, for a block device to the inode of its device node.
//!   Whoever asks must have opened the same one ([`crate::block_device::Identity`]).
//! - A writer passes its descriptors to no other process. If it does, its lock is held longer than needed.
//!
//! What a free byte does not say is whether the requests ended with success.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use bascule_types::VmUid;
use bascule_volume_protocol::WriterId;
use libc::{c_int, c_short};
use nix::fcntl::{FcntlArg, fcntl};

/// Whether a writer may have a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriterLock {
    /// A description of the writer is in use, by a descriptor or a request.
    Held,
    /// No request is in flight.
    Free,
    /// The device is another one than the writer opened, or cannot be asked.
    NoProof,
}

/// Locks the writer's byte of `file`, for as long as its open file description exists. Several
/// descriptions of one writer hold it together.
///
/// # Errors
/// The system's; the writer must not get the device then.
pub fn hold(file: impl AsFd, writer: WriterId) -> io::Result<()> {
    let lock = byte_of(writer, libc::F_RDLCK)?;
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

/// Whether another description than `file`'s holds the writer's byte.
///
/// # Errors
/// The system's.
pub fn is_held(file: impl AsFd, writer: WriterId) -> io::Result<bool> {
    let mut lock = byte_of(writer, libc::F_WRLCK)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// The living process `pid` as a writer of `vm`.
///
/// # Errors
/// When there is no such process.
pub fn writer_of(vm: VmUid, pid: u32) -> io::Result<WriterId> {
    writer_started(vm, pid, start_time(pid))
}

/// The process `pid`, which `started` then, as a writer of `vm`.
///
/// # Errors
/// When there is no such process.
pub fn writer_started(vm: VmUid, pid: u32, started: Option<u64>) -> io::Result<WriterId> {
    let started = started.ok_or_else(|| {
        let what = format!("there is no process {pid}");
        io::Error::new(io::ErrorKind::NotFound, what)
    })?;
    Ok(WriterId { vm, pid, started })
}

/// When a process started, in clock ticks after boot; none if there is none, or a zombie. Its threads
/// may be in the kernel all the same: only its lock says that none of its requests is left.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the name, field 2, may hold anything; state is field 3, start time 22.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (!state.starts_with(['Z', 'X'])).then_some(started)
}

/// A lock on the byte whose offset is (start in clock ticks, process id): unique for the boot. No data
/// need be there.
fn byte_of(writer: WriterId, kind: c_int) -> io::Result<libc::flock> {
    let out_of_range = || io::Error::other("the process id or start time is out of range");
    if writer.pid >> PID_BITS != 0 || writer.started >> STARTED_BITS != 0 {
        return Err(out_of_range());
    }
    let start = (writer.started << PID_BITS) | u64::from(writer.pid);
    Ok(libc::flock {
        l_type: c_short::try_from(kind).map_err(io::Error::other)?,
        l_whence: c_short::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: i64::try_from(start).map_err(io::Error::other)?,
        l_len: 1,
        // Must be 0 for a lock of a description.
        l_pid: 0,
    })
}

/// `PID_MAX_LIMIT` of Linux is 2^22.
const PID_BITS: u32 = 22;
/// 348 years at 100 ticks a second; with the process id the offset stays below 2^62.
const STARTED_BITS: u32 = 40;

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use super::*;

    fn writer(pid: u32, started: u64) -> WriterId {
        WriterId {
            vm: VmUid::from_bytes([1; 16]),
            pid,
            started,
        }
    }

    #[test]
    fn a_byte_is_free_when_the_last_description_is_gone_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        File::create(&path).unwrap();
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap()
        };
        let (asks, first, second) = (open(), open(), open());
        let me = writer(7, 100);
        assert!(!is_held(&asks, me).unwrap());
        hold(&first, me).unwrap();
        hold(&second, me).unwrap();
        let duplicate = second.try_clone().unwrap();
        for left in [Some(first), Some(second), None] {
            assert!(is_held(&asks, me).unwrap(), "{left:?}");
            drop(left);
        }
        for other in [writer(7, 101), writer(8, 100)] {
            assert!(!is_held(&asks, other).unwrap(), "another process");
        }
        drop(duplicate);
        assert!(!is_held(&asks, me).unwrap());
    }

    #[test]
    fn no_process_shares_a_byte_with_another() {
        let last = (1 << PID_BITS) - 1;
        let ends = [
            writer(last, 0),
            writer(0, 1),
            writer(last, (1 << STARTED_BITS) - 1),
        ];
        let bytes = ends.map(|end| byte_of(end, libc::F_RDLCK).unwrap().l_start);
        assert_eq!(bytes, [i64::from(last), i64::from(last) + 1, (1 << 62) - 1]);
        byte_of(writer(last + 1, 0), libc::F_RDLCK).unwrap_err();
        byte_of(writer(1, 1 << STARTED_BITS), libc::F_RDLCK).unwrap_err();
    }
}
