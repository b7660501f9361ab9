//! Making a destination's memory resident while the source already copies.
//!
//! A thread of its own does it, piece by piece. The destination acknowledges no stop of the guest before it has
//! succeeded, so that a node without enough memory ends the attempt while the guest runs on the source.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::fault::{FaultPoint, Faults};
use crate::machine::MachineHandle;
use crate::memory::GuestMemory;

/// Guest memory that a thread makes resident. Dropping it ends the thread after its present piece.
#[derive(Debug)]
pub struct PrefaultedMemory {
    memory: Arc<GuestMemory>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    progress: Mutex<Progress>,
    ended: Condvar,
}

/// How far the thread is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Progress {
    #[default]
    UnderWay,
    /// All of the memory is resident.
    Resident {
        /// How long it took.
        took: Duration,
    },
    /// The kernel has not got the memory; this is its reason.
    Failed(String),
}

impl PrefaultedMemory {
    /// Begins to make all of the machine's memory resident.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn begin(machine: &MachineHandle, faults: Faults) -> io::Result<Self> {
        Self::with(machine, move |address, bytes| {
            faults.pass(FaultPoint::DestinationResident)?;
            populate(address, bytes)
        })
    }

    /// Begins to call `populate` for each piece of the machine's memory: its address in this process and its length
    /// in bytes.
    pub(super) fn with(
        machine: &MachineHandle,
        mut populate: impl FnMut(*mut u8, usize) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let memory = Arc::clone(machine.memory());
        let shared = Arc::new(Shared::default());
        let (of_thread, pieces) = (Arc::clone(&shared), Arc::clone(&memory));
        let run = move || {
            let began = Instant::now();
            let ended = each_piece(&pieces, &of_thread.cancelled, &mut populate);
            of_thread.end(match ended {
                Ok(()) => Progress::Resident {
                    took: began.elapsed(),
                },
                Err(error) => Progress::Failed(format!("no memory for the guest: {error}")),
            });
        };
        let thread = std::thread::Builder::new().name("prefault".to_owned());
        Ok(Self {
            memory,
            shared,
            thread: Some(thread.spawn(run)?),
        })
    }

    /// The memory.
    pub(super) const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// How far it is now.
    pub(super) fn progress(&self) -> Progress {
        self.shared.progress().clone()
    }

    /// How far it is when it has ended, or after this time.
    pub(super) fn wait(&self, limit: Duration) -> Progress {
        let under_way = |progress: &mut Progress| *progress == Progress::UnderWay;
        let waited =
            (self.shared.ended).wait_timeout_while(self.shared.progress(), limit, under_way);
        let (progress, _) = waited.unwrap_or_else(PoisonError::into_inner);
        progress.clone()
    }
}

impl Drop for PrefaultedMemory {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread that makes memory resident has panicked");
        }
    }
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, end: Progress) {
        *self.progress() = end;
        self.ended.notify_all();
    }
}

fn each_piece(
    memory: &GuestMemory,
    cancelled: &AtomicBool,
    populate: &mut impl FnMut(*mut u8, usize) -> io::Result<()>,
) -> io::Result<()> {
    for region in memory.iter() {
        let length = usize::try_from(region.len()).unwrap_or(0);
        for start in (0..length).step_by(PIECE_BYTES) {
            if cancelled.load(Ordering::Relaxed) {
                return Err(io::Error::other("the attempt has ended"));
            }
            let bytes = PIECE_BYTES.min(length - start);
            populate(region.as_ptr().wrapping_add(start), bytes)?;
        }
    }
    Ok(())
}

/// Makes a piece of guest memory resident. What the source has sent already stays as it is.
#[expect(unsafe_code, reason = "the kernel is handed guest memory's addresses")]
fn populate(address: *mut u8, bytes: usize) -> io::Result<()> {
    use rustix::mm::{Advice, madvise};
    // SAFETY: `each_piece` hands over a range within one mapping of guest memory, which the thread's
    // `Arc` keeps alive; populating it changes no byte and no protection.
    let populated = unsafe { madvise(address.cast(), bytes, Advice::LinuxPopulateWrite) };
    match populated {
        // Kernels before 5.14 do it page by page, when the pages are written.
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Bytes of memory made resident by one system call: a cancelled attempt ends after the time for one.
const PIECE_BYTES: usize = 64 << 20;
