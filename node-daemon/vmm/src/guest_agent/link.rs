//! What the port's thread, the client's thread and the VM actor share.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bascule_devices::console::HostPort;
use bascule_ipc::vm::GuestAgent;

/// What the threads share.
#[derive(Debug)]
pub(super) struct Link {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Whether a program in the guest has the port open, and whether it was opened since the client last looked.
    open: bool,
    is_new: bool,
    /// The device is gone, and the client with it.
    gone: bool,
    shutdown: Shutdown,
    agent: GuestAgent,
}

/// Whether the agent was told to shut the guest down, since it opened the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shutdown {
    No,
    Wanted,
    Ordered,
}

/// What the client does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The time of the next poll has come.
    Poll,
    /// The same, and the guest has opened the port since the last one.
    Opened,
    /// The guest is to be shut down.
    Shutdown,
    /// The machine is gone.
    Gone,
}

impl Link {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                open: false,
                is_new: false,
                gone: false,
                shutdown: Shutdown::No,
                agent: GuestAgent::Absent,
            }),
            changed: Condvar::new(),
        })
    }

    /// Waits for what the client does next: until `poll` while the port is open, and without an end while it is not. A
    /// guest that closes and opens the port again and again is not asked more often.
    pub(super) fn wait(&self, poll: Instant) -> Due {
        let mut state = self.lock();
        loop {
            if state.gone {
                return Due::Gone;
            }
            if !state.open {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.shutdown == Shutdown::Wanted {
                state.shutdown = Shutdown::Ordered;
                return Due::Shutdown;
            }
            let left = poll.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return if std::mem::take(&mut state.is_new) {
                    Due::Opened
                } else {
                    Due::Poll
                };
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The client has learned this of the agent.
    pub(super) fn publish(&self, agent: GuestAgent) {
        let mut state = self.lock();
        // An answer of an agent that has closed the port meanwhile is outdated.
        if state.open && !state.is_new {
            state.agent = agent;
        }
    }

    fn set_open(&self, open: bool) {
        let mut state = self.lock();
        if state.open == open || state.gone {
            return;
        }
        state.open = open;
        state.is_new = open;
        state.shutdown = Shutdown::No;
        state.agent = if open {
            GuestAgent::Waiting
        } else {
            GuestAgent::Absent
        };
        self.changed.notify_all();
    }

    /// The guest is off, or elsewhere: there is no agent any more.
    fn end(&self) {
        self.set_open(false);
        self.lock().gone = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent after every assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The VM actor's handle of the client.
#[derive(Clone, Debug)]
pub(crate) struct AgentHandle(pub(super) Arc<Link>);

impl AgentHandle {
    /// For the status.
    pub(crate) fn status(&self) -> GuestAgent {
        self.0.lock().agent.clone()
    }

    /// Ends the client: the guest is off, or runs on another node. Its device may live on as long as a console is attached.
    pub(crate) fn end(&self) {
        self.0.end();
    }

    /// Has the client tell the agent to shut the guest down. False, and nothing is done, when the agent does not answer,
    /// or was told before: whoever asks presses the power button then.
    pub(crate) fn shut_down(&self) -> bool {
        let mut state = self.0.lock();
        let is_connected = matches!(state.agent, GuestAgent::Connected(_));
        if !is_connected || state.shutdown != Shutdown::No {
            return false;
        }
        state.shutdown = Shutdown::Wanted;
        self.0.changed.notify_all();
        true
    }
}

/// The device's end of the port.
#[derive(Debug)]
pub(super) struct DeviceEnd {
    pub(super) stream: UnixStream,
    pub(super) link: Arc<Link>,
}

impl HostPort for DeviceEnd {
    fn raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    fn receive(&self, data: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(data)
    }

    fn send(&self, data: &[u8]) -> io::Result<usize> {
        (&self.stream).write(data)
    }

    fn guest_opened(&self, open: bool) {
        self.link.set_open(open);
    }
}

impl Drop for DeviceEnd {
    fn drop(&mut self) {
        self.link.end();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A guest could have kept its client busy by closing and opening the port.
    #[test]
    fn a_port_that_is_opened_again_and_again_is_not_asked_before_its_time() {
        let link = Link::new();
        let waiting = Arc::clone(&link);
        let next = Instant::now() + Duration::from_secs(3600);
        let waiter = std::thread::Builder::new().spawn(move || waiting.wait(next));
        for _ in 0..1000 {
            link.set_open(true);
            std::thread::yield_now();
            link.set_open(false);
        }
        link.set_open(true);
        link.lock().gone = true;
        link.changed.notify_all();
        assert_eq!(waiter.unwrap().join().unwrap(), Due::Gone);
        link.lock().gone = false;
        assert_eq!(link.wait(Instant::now()), Due::Opened);
        assert_eq!(link.wait(Instant::now()), Due::Poll);
    }
}
