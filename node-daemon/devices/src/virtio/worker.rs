//! The thread of a virtio device.
//!
//! ```text
//!            activate                    pause
//!   idle ───────────────► active ◄──────────────► paused (active or idle)
//!     ▲                     │       resume
//!     └── reset ◄───────────┴── a broken queue: broken, then only reset helps
//! ```
//! The thread owns the queues and the handler. It is asked to do something through an inbox and
//! answers each request; while it is paused it listens to that inbox alone, so nothing else can
//! make it touch guest memory.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use serde_json::Value;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{QueueError, Virtqueue};
use super::shared::Shared;
use crate::failure::DeviceFailure;
use crate::guest_ram::GuestRam;

/// The queues of a device in use, and what its handler needs with them.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) ram: Arc<GuestRam>,
    /// By index; none for a queue that the driver did not enable.
    pub(crate) queues: Vec<Option<Virtqueue>>,
    pub(crate) features: u64,
    pub(crate) shared: Arc<Shared>,
}

/// Why a handler cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandlerError {
    #[error("queue {queue}: {source}")]
    Queue {
        queue: usize,
        #[source]
        source: QueueError,
    },
    #[error("{what}: {source}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// What a device does with its queues. Everything runs on the device's thread.
pub(crate) trait QueueHandler: Send + 'static {
    /// Descriptors to watch besides the queues' notifications, edge-triggered for reading and
    /// writing.
    fn watched(&self) -> Vec<RawFd>;

    /// The queues were just taken into use, restored, or are worked on again after a pause: look
    /// at everything.
    fn start(&mut self, active: &mut Active) -> Result<(), HandlerError>;

    /// The driver notified a queue.
    fn queue_notified(&mut self, active: &mut Active, queue: usize) -> Result<(), HandlerError>;

    /// A watched descriptor, by its index, became ready.
    fn fd_ready(&mut self, active: &mut Active, index: usize) -> Result<(), HandlerError>;

    /// When [`QueueHandler::tick`] is due, if at all.
    fn tick_after(&self) -> Option<Duration> {
        None
    }

    /// Time has passed.
    fn tick(&mut self, _active: &mut Active) -> Result<(), HandlerError> {
        Ok(())
    }

    /// Waits until nothing is in flight and its results are in guest memory. Nothing may be in
    /// flight after an error either.
    fn quiesce(&mut self, active: &mut Active) -> Result<(), HandlerError>;

    /// Forgets the driver: unanswered requests and whatever it negotiated. Called quiesced.
    fn reset(&mut self);

    /// What it holds beyond the queues, as saved. Called quiesced.
    fn save(&self) -> Value;

    /// Takes a saved state over. The queues are as they were saved; nothing may be answered
    /// before [`QueueHandler::start`].
    fn restore(&mut self, active: Option<&mut Active>, state: &Value) -> Result<(), String>;
}

/// A request to the thread.
enum Command {
    Activate(Active, SyncSender<()>),
    Reset(SyncSender<()>),
    Pause(SyncSender<()>),
    Resume(SyncSender<()>),
    Save(SyncSender<Saved>),
    Restore(Option<Active>, Value, SyncSender<Result<(), String>>),
    Stop,
}

/// What the thread adds to a saved state.
#[derive(Debug)]
pub(crate) struct Saved {
    /// Each queue's next available and next used entry; none for a queue not in use.
    pub(crate) positions: Vec<Option<(u16, u16)>>,
    pub(crate) handler: Value,
}

/// The vCPU side's end of the thread.
#[derive(Debug)]
pub(crate) struct Worker {
    command_tx: Sender<Command>,
    wake: EventFd,
    kicks: Vec<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// The thread is gone: it panicked, and that has been reported.
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

    /// The eventfd that stands for a notification of `queue`.
    pub(crate) fn kick(&self, queue: usize) -> Option<&EventFd> {
        self.kicks.get(queue)
    }

    pub(crate) fn activate(&self, active: Active) -> Result<(), WorkerGone> {
        self.request(|reply_tx| Command::Activate(active, reply_tx))
    }

    pub(crate) fn reset(&self) -> Result<(), WorkerGone> {
        self.request(Command::Reset)
    }

    pub(crate) fn pause(&self) -> Result<(), WorkerGone> {
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
            // Only a counter that nobody has read 2^64 - 2 times refuses a write.
            tracing::warn!(%error, "device thread not woken");
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
                "device thread ended badly"
            );
        }
    }
}

/// The thread's own data.
struct WorkerThread<H> {
    shared: Arc<Shared>,
    handler: H,
    active: Option<Active>,
    paused: bool,
    /// Restored and not yet resumed.
    restored: bool,
    command_rx: Receiver<Command>,
    epoll: Epoll,
    wake: EventFd,
    kicks: Vec<EventFd>,
}

/// Why the loop turns.
enum Event {
    Command(Command),
    Ready(Vec<u64>),
    Tick,
}

/// A panic ends this device, is reported, and ends the machine through that report.
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
    /// Waits for something to do. `None` when the device's owner is gone.
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
                // Nothing can wake it any more but its owner.
                self.paused = true;
                Some(Event::Ready(Vec::new()))
            }
        }
    }

    /// `false` when the thread must end.
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
        // An asker that is gone does not need its answer.
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
                reply_tx.send(()).ok();
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
                    // A driver may ring for a queue that it never enabled.
                    match active.queues.get(queue) {
                        Some(Some(_)) => handler.queue_notified(active, queue),
                        _ => Ok(()),
                    }
                });
            }
        }
    }

    /// Quiesces a broken device too: its I/O may still be in flight.
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

impl HandlerError {
    /// Names the queue that an error belongs to.
    pub(crate) fn for_queue(queue: usize) -> impl Fn(QueueError) -> Self {
        move |source| Self::Queue { queue, source }
    }
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
}

/// Takes an eventfd's count; that it is zero already (a racing reader) is fine.
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
/// Above every queue index.
const TOKEN_FIRST_FD: u64 = 1 << 32;
/// Events taken per wake-up; the rest come with the next.
const EVENTS_MAX: usize = 16;
