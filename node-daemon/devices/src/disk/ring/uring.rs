//! io_uring.
#![expect(unsafe_code, reason = "io_uring takes raw addresses")]

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::EventFd;

use super::{Command, HostRun, Ring};

/// A thin layer over io_uring, which can do nothing but read, write and sync its one file.
pub struct UringRing {
    ring: IoUring,
    /// Signalled at every completion.
    eventfd: EventFd,
    /// Commands in the submission queue that the kernel has not taken.
    pushed: usize,
    /// What the commands in the submission queue point to: the kernel reads it during submission only.
    vectors: Vec<Box<[HostRun]>>,
    in_flight: usize,
    /// The kernel refused a submission, whose entries are still in the submission queue. No further
    /// submission may be made, because the kernel would take those entries up when their memory may be
    /// gone.
    broken: bool,
}

impl UringRing {
    /// A ring for the commands on `file`, to which it keeps a reference.
    pub(crate) fn new(file: &OwnedFd) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(ENTRIES)?;
        if !ring.params().is_feature_submit_stable() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is too old (Linux 5.10 is needed)",
            ));
        }
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_eventfd(eventfd.as_raw_fd())?;
        submitter.register_files(&[file.as_raw_fd()])?;
        // For good: a process that a guest has taken over can open, connect or map nothing through the ring.
        let mut restrictions = [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits()),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ];
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            eventfd,
            pushed: 0,
            vectors: Vec::new(),
            in_flight: 0,
            broken: false,
        })
    }

    pub(crate) fn completion_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// The command's entry. What it points to beside the runs is kept in `self.vectors`.
    fn entry(&mut self, command: Command<'_>) -> io::Result<Entry> {
        Ok(match command {
            Command::Read {
                runs: &[run],
                offset,
            } => opcode::Read::new(FILE, start(run), length(run)?)
                .offset(offset)
                .build(),
            Command::Read { runs, offset } => {
                let (vectors, count) = self.vectors(runs)?;
                opcode::Readv::new(FILE, vectors, count)
                    .offset(offset)
                    .build()
            }
            Command::Write {
                runs: &[run],
                offset,
                durable,
            } => opcode::Write::new(FILE, start(run), length(run)?)
                .offset(offset)
                .rw_flags(rw_flags(durable))
                .build(),
            Command::Write {
                runs,
                offset,
                durable,
            } => {
                let (vectors, count) = self.vectors(runs)?;
                opcode::Writev::new(FILE, vectors, count)
                    .offset(offset)
                    .rw_flags(rw_flags(durable))
                    .build()
            }
            Command::Sync => opcode::Fsync::new(FILE)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        })
    }

    fn vectors(&mut self, runs: &[HostRun]) -> io::Result<(*const libc::iovec, u32)> {
        let count = u32::try_from(runs.len()).map_err(io::Error::other)?;
        let vectors: Box<[HostRun]> = runs.into();
        let at = vectors.as_ptr().cast();
        self.vectors.push(vectors);
        Ok((at, count))
    }
}

impl Ring for UringRing {
    fn has_room(&self) -> bool {
        self.in_flight + self.pushed < IN_FLIGHT_MAX
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// After an error the ring takes no further command, but [`Ring::wait`] still works.
    unsafe fn push(&mut self, command: Command<'_>, tag: u64) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(
                "io_uring failed before and takes no more commands; open the disk again",
            ));
        }
        let entry = self.entry(command)?.user_data(tag);
        // SAFETY: the file is registered, so the kernel keeps it. The vector arrays live until the submission that
        // takes the entry has returned, and are not read after it (the submit-stable feature was checked); if it
        // fails there is no other one. What the vectors point to is the caller's promise.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::Error::other("the submission queue is full"))?;
        self.pushed += 1;
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        while self.pushed > 0 && !self.broken {
            match self.ring.submit() {
                Ok(taken @ 1..) => {
                    self.pushed = self.pushed.saturating_sub(taken);
                    self.in_flight += taken;
                }
                Ok(0) => {
                    self.broken = true;
                    return Err(io::Error::other("the kernel took no submission"));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
        }
        if !self.broken {
            self.vectors.clear();
        }
        Ok(())
    }

    fn reap(&mut self) -> Option<(u64, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        let result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
        Some((entry.user_data(), result))
    }

    fn acknowledge(&self) {
        // An error means that its count was 0 already.
        self.eventfd.read().ok();
    }

    fn wait(&mut self) -> io::Result<()> {
        if self.in_flight == 0 || !self.ring.completion().is_empty() {
            return Ok(());
        }
        const GET_EVENTS: u32 = 1;
        loop {
            // SAFETY: no argument is passed; zero entries are submitted, so nothing but this
            // ring's own completions is touched.
            let entered = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 1, GET_EVENTS, None)
            };
            match entered {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

impl std::fmt::Debug for UringRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringRing")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

fn start(run: HostRun) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(run.address)
}

fn length(run: HostRun) -> io::Result<u32> {
    u32::try_from(run.length).map_err(io::Error::other)
}

const fn rw_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

const _: () = {
    assert!(size_of::<HostRun>() == size_of::<libc::iovec>());
    assert!(offset_of!(HostRun, address) == offset_of!(libc::iovec, iov_base));
    assert!(offset_of!(HostRun, length) == offset_of!(libc::iovec, iov_len));
};

/// The one registered file.
const FILE: types::Fixed = types::Fixed(0);
/// Size of the submission queue: a batch may hold all commands in flight.
const ENTRIES: u32 = 256;
/// The completion queue has twice as many entries as the submission queue: it never overflows.
const IN_FLIGHT_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// What the kernel answers to an entry that this ring never makes itself.
    fn answer(entry: &Entry) -> i32 {
        let file = tempfile::tempfile().unwrap().into();
        let mut ring = UringRing::new(&file).unwrap();
        // SAFETY: the entries of these tests point to nothing.
        unsafe { ring.ring.submission().push(entry) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_does_nothing_but_io_on_its_own_file() {
        let other = File::open("/dev/null").unwrap();
        let other_file = opcode::Fsync::new(types::Fd(other.as_raw_fd())).build();
        assert_eq!(answer(&other_file), -libc::EACCES, "another file");
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        assert_eq!(answer(&socket), -libc::EACCES, "a socket");
        let nop = opcode::Nop::new().build().flags(Flags::FIXED_FILE);
        assert_eq!(answer(&nop), -libc::EACCES, "an operation that is not used");
        let own_file = opcode::Fsync::new(FILE).build();
        assert_eq!(answer(&own_file), 0, "its own file");
    }

    #[test]
    fn a_ring_registers_nothing_more() {
        let file = tempfile::tempfile().unwrap().into();
        let ring = UringRing::new(&file).unwrap();
        let other = File::open("/dev/null").unwrap();
        let update = ring
            .ring
            .submitter()
            .register_files_update(0, &[other.as_raw_fd()]);
        assert_eq!(update.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn a_batch_is_in_flight_when_it_was_submitted_and_not_before() {
        let file = tempfile::tempfile().unwrap().into();
        let mut ring = UringRing::new(&file).unwrap();
        for tag in 0..3 {
            assert!(ring.has_room());
            // SAFETY: a sync has no memory.
            unsafe { ring.push(Command::Sync, tag) }.unwrap();
        }
        assert_eq!(ring.in_flight(), 0);
        ring.submit().unwrap();
        assert_eq!(ring.in_flight(), 3);
        let mut tags = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            while let Some((tag, result)) = ring.reap() {
                assert_eq!(result.unwrap(), 0);
                tags.push(tag);
            }
        }
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2]);
    }

    #[test]
    fn the_ring_has_room_for_one_whole_batch_and_no_more() {
        let file = tempfile::tempfile().unwrap().into();
        let mut ring = UringRing::new(&file).unwrap();
        let mut count = 0;
        while ring.has_room() {
            // SAFETY: a sync has no memory.
            unsafe { ring.push(Command::Sync, count) }.unwrap();
            count += 1;
        }
        assert_eq!(count, 256);
        ring.submit().unwrap();
        assert!(!ring.has_room(), "all are in flight");
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            while ring.reap().is_some() {}
        }
    }
}
