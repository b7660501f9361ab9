//! A vCPU: a thread that runs the guest until it is kicked or the guest ends.
//!
//! # States
//! ```text
//!            run                       kick, or the guest ends
//!  parked ─────────► in the guest ─────────────────────────────► parked
//!    │ save, restore, reset: done by the thread itself
//!    └─ dropped: the thread ends
//! ```
//! A parked vCPU has no half-done instruction: an access that was under way when it was kicked was
//! completed first, so that its registers are all of its state.
#![expect(
    unsafe_code,
    reason = "a signal handler reaches the running vCPU through a thread-local"
)]

pub(crate) mod msr;
mod readable;
pub(crate) mod shape;
pub(crate) mod state;

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;
use std::time::Duration;

use bascule_ipc::vm::{ResetCause, StopReason};
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_regs, kvm_run,
    kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use self::shape::StateShape;
use self::state::VcpuState;
use crate::GuestEnd;
use crate::bus::Bus;
use crate::kvm::KvmError;
use crate::power::PowerRequest;

/// Called when the guest ended, once per vCPU that noticed; must not block.
pub(crate) type OnEnd = Arc<dyn Fn(GuestEnd) + Send + Sync>;

/// First registers of the boot processor.
pub(crate) type FirstRegisters = (kvm_regs, kvm_sregs);

/// How long to wait for a kicked vCPU before kicking it again: far more than an exit takes.
const KICK_AGAIN: Duration = Duration::from_millis(50);
/// Most exits of one instruction that is being completed: KVM enters the guest again after 1024 accesses of
/// a string instruction (`x86_emulate_insn`), an access of 32 bytes is four.
const ACCESS_EXITS_MAX: usize = 4096;

/// The handle of a vCPU thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    index: u32,
    pause: Arc<AtomicBool>,
    command_tx: Option<SyncSender<Command>>,
    parked_rx: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

/// A command to a parked vCPU.
enum Command {
    Run,
    Save(SyncSender<Result<VcpuState, KvmError>>),
    Restore(Box<VcpuState>, SyncSender<Result<(), KvmError>>),
    Reset(Arc<VcpuState>, SyncSender<Result<(), KvmError>>),
    FirstRegisters(Box<FirstRegisters>, SyncSender<Result<(), KvmError>>),
    TscOffset(u64, SyncSender<Result<(), KvmError>>),
}

/// The vCPU as its thread holds it.
struct Runner {
    fd: VcpuFd,
    bus: Arc<Bus>,
    shape: Arc<StateShape>,
    pause: Arc<AtomicBool>,
    on_end: OnEnd,
}

/// Why a vCPU left the guest.
enum Ended {
    Paused,
    ByItself(GuestEnd),
}

impl Vcpu {
    /// Starts the thread of vCPU `index`, parked.
    pub(crate) fn spawn(
        index: u32,
        fd: VcpuFd,
        bus: Arc<Bus>,
        shape: Arc<StateShape>,
        on_end: OnEnd,
    ) -> Result<Self, KvmError> {
        install_kick_handler();
        let pause = Arc::new(AtomicBool::new(false));
        let (command_tx, command_rx) = sync_channel(1);
        let (parked_tx, parked_rx) = sync_channel(1);
        let runner = Runner {
            fd,
            bus,
            shape,
            pause: Arc::clone(&pause),
            on_end,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || runner.serve(&command_rx, &parked_tx))
            .map_err(|_| KvmError::Lacks {
                what: "a thread for a vCPU",
            })?;
        Ok(Self {
            index,
            pause,
            command_tx: Some(command_tx),
            parked_rx,
            thread: Some(thread),
        })
    }

    /// Lets the guest run. The vCPU must be parked.
    pub(crate) fn run(&self) -> Result<(), KvmError> {
        self.pause.store(false, Ordering::SeqCst);
        self.send(Command::Run)
    }

    /// Asks a running vCPU to park, without waiting for it.
    pub(crate) fn kick(&self) {
        self.pause.store(true, Ordering::SeqCst);
        if let Some(thread) = &self.thread
            && let Err(error) = thread.kill(SIGRTMIN())
        {
            tracing::warn!(%error, vcpu = self.index, "cannot kick");
        }
    }

    /// Waits until a kicked vCPU, or one whose guest ended, has parked.
    pub(crate) fn await_parked(&self) -> Result<(), KvmError> {
        loop {
            match self.parked_rx.recv_timeout(KICK_AGAIN) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => self.kick(),
                Err(RecvTimeoutError::Disconnected) => return Err(KvmError::VcpuGone),
            }
        }
    }

    /// Begins to read a parked vCPU's state; the answer comes by the channel, so that all vCPUs
    /// can be read at once.
    pub(crate) fn save(&self) -> Result<Receiver<Result<VcpuState, KvmError>>, KvmError> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.send(Command::Save(reply_tx))?;
        Ok(reply_rx)
    }

    /// Writes the state of a parked vCPU that has never run.
    pub(crate) fn restore(
        &self,
        state: VcpuState,
    ) -> Result<Receiver<Result<(), KvmError>>, KvmError> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.send(Command::Restore(Box::new(state), reply_tx))?;
        Ok(reply_rx)
    }

    /// Returns a parked vCPU to its state at power-on, [`state::reset`].
    pub(crate) fn reset(
        &self,
        power_on: &Arc<VcpuState>,
    ) -> Result<Receiver<Result<(), KvmError>>, KvmError> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.send(Command::Reset(Arc::clone(power_on), reply_tx))?;
        Ok(reply_rx)
    }

    /// Lets a parked vCPU that was just created or reset begin here.
    pub(crate) fn set_first_registers(&self, first: FirstRegisters) -> Result<(), KvmError> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.send(Command::FirstRegisters(Box::new(first), reply_tx))?;
        answer(&reply_rx)
    }

    /// Sets guest TSC minus host TSC of a parked vCPU.
    pub(crate) fn set_tsc_offset(&self, offset: u64) -> Result<(), KvmError> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.send(Command::TscOffset(offset, reply_tx))?;
        answer(&reply_rx)
    }

    fn send(&self, command: Command) -> Result<(), KvmError> {
        let command_tx = self.command_tx.as_ref().ok_or(KvmError::VcpuGone)?;
        command_tx.send(command).map_err(|_| KvmError::VcpuGone)
    }
}

/// The answer to [`Vcpu::save`] or [`Vcpu::restore`].
pub(crate) fn answer<T>(reply_rx: &Receiver<Result<T, KvmError>>) -> Result<T, KvmError> {
    reply_rx.recv().map_err(|_| KvmError::VcpuGone)?
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        drop(self.command_tx.take());
        self.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.index, "vCPU thread panicked");
        }
    }
}

impl Runner {
    fn serve(mut self, command_rx: &Receiver<Command>, parked_tx: &SyncSender<()>) {
        let _kickable = Kickable::enter(&mut self.fd);
        while let Ok(command) = command_rx.recv() {
            let answered = match command {
                Command::Run => {
                    if let Ended::ByItself(end) = self.run_guest() {
                        (self.on_end)(end);
                    }
                    self.log_place();
                    parked_tx.send(()).is_ok()
                }
                Command::Save(reply_tx) => {
                    reply_tx.send(state::save(&self.fd, &self.shape)).is_ok()
                }
                Command::Restore(state, reply_tx) => {
                    let restored = state::restore(&self.fd, &self.shape, &state);
                    reply_tx.send(restored).is_ok()
                }
                Command::Reset(power_on, reply_tx) => {
                    let reset = state::reset(&self.fd, &self.shape, &power_on);
                    reply_tx.send(reset).is_ok()
                }
                Command::FirstRegisters(first, reply_tx) => reply_tx
                    .send(state::set_first_registers(&self.fd, &first))
                    .is_ok(),
                Command::TscOffset(offset, reply_tx) => {
                    let set = crate::ioctl::set_tsc_offset(&self.fd, offset)
                        .map_err(KvmError::ioctl("set the TSC offset"));
                    reply_tx.send(set).is_ok()
                }
            };
            if !answered {
                return;
            }
        }
    }

    fn run_guest(&mut self) -> Ended {
        // Tells a guest with kvm-clock that the host stopped it, so that its watchdog does not fire
        // (KVM API, KVM_KVMCLOCK_CTRL); fails with EINVAL for a guest without.
        if let Err(error) = self.fd.kvmclock_ctrl() {
            tracing::trace!(%error, "kvmclock_ctrl");
        }
        self.fd.set_kvm_immediate_exit(0);
        loop {
            // # Ordering
            // `kick` sets the flag before it signals. A signal that came before this read has its
            // flag seen here; one that comes later sets `immediate_exit`, which is not cleared again.
            if self.pause.load(Ordering::SeqCst) {
                return match self.complete_access(None) {
                    Some(end) => Ended::ByItself(end),
                    None => Ended::Paused,
                };
            }
            if let Err(end) = self.enter() {
                let first = self.complete_access(Some(end.clone()));
                return Ended::ByItself(first.unwrap_or(end));
            }
        }
    }

    /// Lets KVM finish an access whose result it has not taken over yet (KVM API, 5, "KVM_EXIT_IO":
    /// the operation is complete only after the vCPU was entered again). It would else be finished in
    /// whatever state the vCPU is entered next, that after a reset too. Returns how the guest first ended,
    /// `ended` if it has.
    fn complete_access(&mut self, mut ended: Option<GuestEnd>) -> Option<GuestEnd> {
        self.fd.set_kvm_immediate_exit(1);
        for _ in 0..ACCESS_EXITS_MAX {
            match self.enter() {
                Ok(Entered::Again) => {}
                Ok(Entered::Interrupted) => return ended,
                Err(end) => {
                    ended.get_or_insert(end);
                }
            }
        }
        ended
    }

    /// Runs the guest to its next exit and handles that.
    fn enter(&mut self) -> Result<Entered, GuestEnd> {
        match self.fd.run() {
            Ok(exit) => match handle(exit, &self.bus) {
                Handled::Continue => Ok(Entered::Again),
                Handled::End(end) => Err(end),
                Handled::InternalError => Err(self.internal_error()),
            },
            Err(error) => match error.errno() {
                libc::EINTR => Ok(Entered::Interrupted),
                libc::EAGAIN => Ok(Entered::Again),
                _ => Err(GuestEnd::failed(format!("KVM_RUN: {error}"))),
            },
        }
    }

    /// Logs the instruction pointer, for debugging a guest that hangs.
    fn log_place(&self) {
        if tracing::enabled!(tracing::Level::DEBUG)
            && let Ok(regs) = self.fd.get_regs()
        {
            tracing::debug!(rip = format_args!("{:#x}", regs.rip), "parked");
        }
    }

    /// KVM failed to emulate an instruction; reports its address.
    fn internal_error(&mut self) -> GuestEnd {
        let place = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills in this member;
        // any bytes make a valid value of its integers.
        let details = unsafe { run.__bindgen_anon_1.internal };
        GuestEnd::fault(format!(
            "KVM cannot emulate the guest (suberror {}) at {place:#x}",
            details.suberror
        ))
    }
}

enum Entered {
    Again,
    Interrupted,
}

enum Handled {
    Continue,
    End(GuestEnd),
    InternalError,
}

fn handle(exit: VcpuExit<'_>, bus: &Bus) -> Handled {
    let request = match exit {
        VcpuExit::IoIn(port, data) => {
            bus.port_read(port, data);
            None
        }
        VcpuExit::IoOut(port, data) => bus.port_write(port, data),
        VcpuExit::MmioRead(address, data) => {
            bus.memory_read(address, data);
            None
        }
        VcpuExit::MmioWrite(address, data) => {
            bus.memory_write(address, data);
            None
        }
        VcpuExit::Intr | VcpuExit::IoapicEoi(_) | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr => {
            None
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Some(PowerRequest::Off),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Some(PowerRequest::Reset),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            return Handled::End(GuestEnd::fault("the guest reported a crash"));
        }
        // A PC resets then (SDM vol. 3, 6.15, "Interrupt 8": shutdown mode).
        VcpuExit::Shutdown => return Handled::End(GuestEnd::Reset(ResetCause::TripleFault)),
        VcpuExit::FailEntry(reason, cpu) => {
            let what = format!("cannot enter the guest: reason {reason:#x} on host CPU {cpu}");
            return Handled::End(GuestEnd::fault(what));
        }
        VcpuExit::InternalError => return Handled::InternalError,
        other => {
            return Handled::End(GuestEnd::failed(format!("unexpected exit {other:?}")));
        }
    };
    match request {
        None => Handled::Continue,
        Some(PowerRequest::Off) => Handled::End(GuestEnd::Stopped(StopReason::GuestShutdown)),
        Some(PowerRequest::Reset) => Handled::End(GuestEnd::Reset(ResetCause::Guest)),
    }
}

thread_local! {
    /// The run structure of the vCPU that this thread owns, for the signal handler. Initialised at
    /// compile time, so that the handler's access allocates nothing.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Makes this thread's vCPU kickable until it is dropped.
struct Kickable;

impl Kickable {
    fn enter(fd: &mut VcpuFd) -> Self {
        KVM_RUN.set(ptr::from_mut(fd.get_kvm_run()));
        Self
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        KVM_RUN.set(ptr::null_mut());
    }
}

fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), on_kick) {
            tracing::error!(%error, "cannot install the vCPU kick handler");
        }
    });
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.try_with(Cell::get).unwrap_or(ptr::null_mut());
    if !run.is_null() {
        // SAFETY: non-null only between `Kickable::enter` and its drop, on this very thread, during
        // which the vCPU's mapping lives.
        let flag = unsafe { ptr::addr_of_mut!((*run).immediate_exit) };
        // SAFETY: the byte is in that mapping, and KVM expects it to change at any time.
        unsafe { flag.write_volatile(1) };
    }
}
