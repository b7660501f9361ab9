//! The thread of a virtio device.
//!
//! ```text
//!            activate                    pause
//!   idle ───────────────► active ◄──────────────► paused (active or idle)
//!     ▲                     │       resume
//!     └── reset ◄───────────┴── a queue violation: DEVICE_NEEDS_RESET until reset
//! ```
//! The thread owns the queues and the handler. It receives commands through a channel and replies to
//! each; while it is paused it waits for that channel only, so no notification makes it touch guest
//! memory.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use bascule_types::WriterState;
use serde_json::Value;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::queue::Virtqueue;
use super::queue_handler::{Active, HandlerError, QueueHandler};
use super::shared::Shared;
use crate::failure::DeviceFailure;

/// A command to the thread, with the channel for the reply.
enum Command {
    Activate(Active, SyncSender<()>),
    Reset(SyncSender<()>),
    Pause(SyncSender<WriterState>),
    Resume(SyncSender<()>),
    Save(SyncSender<Saved>),
    Restore(Option<Active>, Value, SyncSender<Result<(), String>>),
    Stop,
}

/// The part of a saved state that the thread holds.
#[derive(Debug)]
pub(crate) struct Saved {
    /// Next available and next used index of each queue; `None` for a queue that is not enabled.
    pub(crate) positions: Vec<Option<(u16, u16)>>,
    pub(crate) handler: Value,
}

/// The handle of a device's thread, held by the PCI function.
#[derive(Debug)]
pub(crate) struct Worker {
    command_tx: Sender<Command>,
    wake: EventFd,
    kicks: Vec<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// The thread has ended: it panicked, which has been reported as a failure.
#[derive(Debug)]
pub(crate) struct WorkerGone;

impl Worker {
    /// Starts a device's thread, idle.
    pub(crate) fn spawn<H: QueueHandler>(
        shared: Arc<Shared>,
        queue_count: usize,
        handler: H,
    ) -> io::Result<Self> {
        let (command_tx, command_rx) = channel();
        let wake = eventfd()?;
        let kicks = (0..queue_count)
            .map(|_| eventfd())
            .collect::<io::Result<Vec<_>>>()?;
        let epoll = Epoll::new()?;
        let level = EventSet::IN;
        let edge = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        watch(&epoll, wake.as_raw_fd(), level, TOKEN_WAKE)?;
        for (kick, token) in kicks.iter().zip(TOKEN_FIRST_KICK..) {
            watch(&epoll, kick.as_raw_fd(), level, token)?;
        }
        for (fd, token) in handler.watched().into_iter().zip(TOKEN_FIRST_FD..) {
            watch(&epoll, fd, edge, token)?;
        }
        let worker_thread = WorkerThread {
            shared: shared.clone(),
            handler,
            active: None,
            paused: false,
            restored: false,
            command_rx,
            epoll,
            wake: wake.try_clone()?,
            kicks: kicks
                .iter()
                .map(EventFd::try_clone)
                .collect::<io::Result<_>>()?,
        };
        let name = shared.name().to_owned();
        let thread = Builder::new()
            .name(name)
            .spawn(move || run(&shared, worker_thread))?;
        Ok(Self {
            command_tx,
            wake,
            kicks,
            thread: Some(thread),
        })
    }

    /// The eventfd that notifies `queue`.
    pub(crate) fn kick(&self, queue: usize) -> Option<&EventFd> {
        self.kicks.get(queue)
    }

    pub(crate) fn activate(&self, active: Active) -> Result<(), WorkerGone> {
        self.request(|reply_tx| Command::Activate(active, reply_tx))
    }

    pub(crate) fn reset(&self) -> Result<(), WorkerGone> {
        self.request(Command::Reset)
    }

    pub(crate) fn pause(&self) -> Result<WriterState, WorkerGone> {
        self.request(Command::Pause)
    }

    pub(crate) fn resume(&self) -> Result<(), WorkerGone> {
        self.request(Command::Resume)
    }

    pub(crate) fn save(&self) -> Result<Saved, WorkerGone> {
        self.request(Command::Save)
    }

    pub(crate) fn restore(
        &self,
        active: Option<Active>,
        handler: Value,
    ) -> Result<Result<(), String>, WorkerGone> {
        self.request(|reply_tx| Command::Restore(active, handler, reply_tx))
    }

    fn request<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, WorkerGone> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.command_tx
            .send(command(reply_tx))
            .map_err(|_| WorkerGone)?;
        self.wake();
        reply_rx.recv().map_err(|_| WorkerGone)
    }

    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            // A write fails only when the counter is at 2^64 - 2.
            tracing::warn!(%error, "cannot wake the device thread");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.command_tx.send(Command::Stop).is_ok() {
            self.wake();
        }
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(
                reason = panic_text(panic.as_ref()),
                "device thread panicked"
            );
        }
    }
}

/// The state of the thread.
struct WorkerThread<H> {
    shared: Arc<Shared>,
    handler: H,
    active: Option<Active>,
    paused: bool,
    /// A state was restored, and the device has not been resumed since.
    restored: bool,
    command_rx: Receiver<Command>,
    epoll: Epoll,
    wake: EventFd,
    kicks: Vec<EventFd>,
}

/// An event that the loop of the thread processes.
enum Event {
    Command(Command),
    Ready(Vec<u64>),
    Tick,
}

/// The loop of the thread. A panic is reported as [`DeviceFailure::Panicked`], which stops the virtual
/// machine.
fn run<H: QueueHandler>(shared: &Shared, mut thread: WorkerThread<H>) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        while let Some(event) = thread.select() {
            if !thread.apply(event) {
                break;
            }
        }
    }));
    if let Err(panic) = result {
        shared.fail(DeviceFailure::Panicked {
            device: shared.name().to_owned(),
            reason: panic_text(panic.as_ref()).to_owned(),
        });
    }
}

impl<H: QueueHandler> WorkerThread<H> {
    /// Waits for the next event. `None` when the [`Worker`] was dropped.
    fn select(&mut self) -> Option<Event> {
        if self.paused {
            return self.command_rx.recv().ok().map(Event::Command);
        }
        if let Ok(command) = self.command_rx.try_recv() {
            return Some(Event::Command(command));
        }
        let ticking = self.active.as_ref().and_then(|_| self.handler.tick_after());
        let timeout = ticking.map_or(-1, |after| {
            i32::try_from(after.as_millis()).unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        match self.epoll.wait(timeout, &mut events) {
            Ok(0) => Some(Event::Tick),
            Ok(count) => Some(Event::Ready(
                events[..count].iter().map(EpollEvent::data).collect(),
            )),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                Some(Event::Ready(Vec::new()))
            }
            Err(source) => {
                self.fail(HandlerError::Host {
                    what: "wait for events",
                    source,
                });
                // Without epoll, only commands can be received.
                self.paused = true;
                Some(Event::Ready(Vec::new()))
            }
        }
    }

    /// Processes an event. Returns `false` when the thread must end.
    fn apply(&mut self, event: Event) -> bool {
        match event {
            Event::Command(Command::Stop) => {
                self.quiesce();
                return false;
            }
            Event::Command(command) => self.command(command),
            Event::Ready(tokens) => {
                for token in tokens {
                    self.ready(token);
                }
            }
            Event::Tick => self.with_active(H::tick),
        }
        true
    }

    fn command(&mut self, command: Command) {
        // A failed reply means that the requester no longer waits.
        match command {
            Command::Activate(active, reply_tx) => {
                self.active = Some(active);
                reply_tx.send(()).ok();
                if !self.paused {
                    self.with_active(H::start);
                }
            }
            Command::Reset(reply_tx) => {
                self.quiesce();
                self.active = None;
                self.handler.reset();
                reply_tx.send(()).ok();
            }
            Command::Pause(reply_tx) => {
                self.quiesce();
                self.paused = true;
                reply_tx.send(self.handler.writer_state()).ok();
            }
            Command::Resume(reply_tx) => {
                self.paused = false;
                reply_tx.send(()).ok();
                self.resume();
            }
            Command::Save(reply_tx) => {
                reply_tx.send(self.save()).ok();
            }
            Command::Restore(mut active, state, reply_tx) => {
                let result = self.handler.restore(active.as_mut(), &state);
                self.active = active;
                self.restored = true;
                reply_tx.send(result).ok();
            }
            Command::Stop => {}
        }
    }

    fn resume(&mut self) {
        if std::mem::take(&mut self.restored)
            && let Some(active) = &self.active
        {
            let queues = active.queues.iter().enumerate();
            for (queue, _) in queues.filter(|(_, queue)| queue.is_some()) {
                self.shared.signal_queue(queue);
            }
        }
        self.with_active(H::start);
    }

    fn save(&self) -> Saved {
        let queues = self
            .active
            .as_ref()
            .map_or(&[][..], |active| &active.queues);
        Saved {
            positions: queues
                .iter()
                .map(|queue| queue.as_ref().map(Virtqueue::position))
                .collect(),
            handler: self.handler.save(),
        }
    }

    fn ready(&mut self, token: u64) {
        match token {
            TOKEN_WAKE => drain(&self.wake),
            TOKEN_FIRST_FD.. => {
                let index = usize::try_from(token - TOKEN_FIRST_FD).unwrap_or(usize::MAX);
                self.with_active(|handler, active| handler.fd_ready(active, index));
            }
            _ => {
                let queue = usize::try_from(token - TOKEN_FIRST_KICK).unwrap_or(usize::MAX);
                if let Some(kick) = self.kicks.get(queue) {
                    drain(kick);
                }
                self.with_active(|handler, active| {
                    // A driver may notify a queue that it did not enable.
                    match active.queues.get(queue) {
                        Some(Some(_)) => handler.queue_notified(active, queue),
                        _ => Ok(()),
                    }
                });
            }
        }
    }

    /// Quiesces the handler, also after a failure: its I/O may still be in flight.
    fn quiesce(&mut self) {
        if let Some(active) = &mut self.active
            && let Err(error) = self.handler.quiesce(active)
        {
            self.fail(error);
        }
    }

    fn with_active(&mut self, work: impl FnOnce(&mut H, &mut Active) -> Result<(), HandlerError>) {
        if self.shared.needs_reset() {
            return;
        }
        let Some(active) = &mut self.active else {
            return;
        };
        if let Err(error) = work(&mut self.handler, active) {
            self.fail(error);
        }
    }

    fn fail(&self, error: HandlerError) {
        if self.shared.needs_reset() {
            return;
        }
        let device = self.shared.name().to_owned();
        self.shared.fail(match error {
            HandlerError::Queue { queue, source } => DeviceFailure::BadVirtqueue {
                device,
                queue,
                reason: source.to_string(),
            },
            HandlerError::Host { what, source } => DeviceFailure::Host {
                device,
                what,
                reason: source.to_string(),
            },
        });
    }
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
}

/// Resets the counter of an eventfd. An error means that it was 0 already, which is harmless.
fn drain(fd: &EventFd) {
    fd.read().ok();
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

const TOKEN_WAKE: u64 = 0;
const TOKEN_FIRST_KICK: u64 = 1;
/// Above the token of every queue.
const TOKEN_FIRST_FD: u64 = 1 << 32;
/// Events read per `epoll_wait`; further events are returned by the next call.
const EVENTS_MAX: usize = 16;
