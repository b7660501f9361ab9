//! io_uring.
#![expect(unsafe_code, reason = "io_uring takes raw addresses")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::EventFd;

use super::{Command, HostRun, Ring};

/// A thin layer over io_uring.
pub struct UringRing {
    ring: IoUring,
    /// Signalled at every completion.
    eventfd: EventFd,
    in_flight: usize,
    /// The kernel refused a submission, whose entry is still in the submission queue. No further
    /// submission may be made, because the kernel would take that entry up when its memory may be
    /// gone.
    broken: bool,
}

impl UringRing {
    pub(crate) fn new() -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        if !ring.params().is_feature_submit_stable() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is too old (Linux 5.5 is needed)",
            ));
        }
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(eventfd.as_raw_fd())?;
        Ok(Self {
            ring,
            eventfd,
            in_flight: 0,
            broken: false,
        })
    }

    pub(crate) fn completion_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

impl Ring for UringRing {
    fn has_room(&self) -> bool {
        self.in_flight < IN_FLIGHT_MAX
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Submits to the kernel at once. After an error the ring takes no further command, but [`Ring::wait`]
    /// still works.
    unsafe fn submit(&mut self, file: &OwnedFd, command: Command<'_>, tag: u64) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(
                "io_uring failed before and takes no more commands; open the disk again",
            ));
        }
        let file = types::Fd(file.as_raw_fd());
        let vectors = match command {
            Command::Read { runs, .. } | Command::Write { runs, .. } => vectors(runs),
            Command::Sync => Vec::new(),
        };
        let count = u32::try_from(vectors.len()).map_err(io::Error::other)?;
        let entry = match command {
            Command::Read { offset, .. } => opcode::Readv::new(file, vectors.as_ptr(), count)
                .offset(offset)
                .build(),
            Command::Write {
                offset, durable, ..
            } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Writev::new(file, vectors.as_ptr(), count);
                write.offset(offset).rw_flags(flags).build()
            }
            Command::Sync => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        let entry = entry.user_data(tag);
        let mut queue = self.ring.submission();
        // SAFETY: the file is open for as long as its owner, which outlives the ring's commands
        // (the engine drains before it drops). The vector array is read during submission only
        // (the submit-stable feature was checked), and `vectors` lives until the end of this
        // function. What the vectors point to is the caller's promise.
        let pushed = unsafe { queue.push(&entry) };
        pushed.map_err(|_| io::Error::other("the submission queue is full"))?;
        drop(queue);
        let taken = loop {
            match self.ring.submit() {
                Ok(1..) => break Ok(()),
                Ok(0) => break Err(io::Error::other("the kernel took no submission")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.broken = taken.is_err();
        self.in_flight += usize::from(taken.is_ok());
        taken
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

fn vectors(runs: &[HostRun]) -> Vec<libc::iovec> {
    runs.iter()
        .map(|run| libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(run.address),
            iov_len: run.length,
        })
        .collect()
}

/// Size of the submission queue. Commands are submitted one by one, so it never holds more than one.
const ENTRIES: u32 = 128;
/// The completion queue has twice as many entries as the submission queue: it never overflows.
const IN_FLIGHT_MAX: usize = 256;
