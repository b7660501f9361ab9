//! The client's thread: when it asks for what.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bascule_devices::console::HostPort;
use bascule_ipc::vm::{GuestAgent, GuestInfo, GuestOs};
use serde::de::{DeserializeOwned, IgnoredAny};

use super::channel::{Channel, Failure};
use super::link::{AgentHandle, DeviceEnd, Due, Link};
use super::replies::{HostName, Info, Interfaces, OsInfo, parse};
use crate::clock::HostClock;

/// What the client does for a guest, besides asking for what the status shows.
pub(crate) struct Duties {
    /// The MAC addresses of the VM's interfaces.
    pub(crate) macs: Vec<[u8; 6]>,
    /// Tell the guest the time once: it does not know how long its memory was on a disk.
    pub(crate) set_time: bool,
    /// Presses the power button of a guest that its agent has not shut down.
    pub(crate) press_button: Box<dyn Fn() + Send>,
    /// Where the time comes from.
    pub(crate) clock: Arc<dyn HostClock>,
}

/// How long the client waits for what.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// For the answer to a request.
    answer: Duration,
    /// Between two polls.
    poll: Duration,
    /// For a guest to be off that its agent was told to shut down.
    shutdown: Duration,
}

/// Starts the client. Returns the device's end of the port, at whose end the client ends too.
///
/// # Errors
/// When there is no socket pair or no thread.
pub(crate) fn start(duties: Duties) -> io::Result<(Arc<dyn HostPort>, AgentHandle)> {
    start_with(duties, PACE)
}

fn start_with(duties: Duties, pace: Pace) -> io::Result<(Arc<dyn HostPort>, AgentHandle)> {
    let (device_end, stream) = UnixStream::pair()?;
    device_end.set_nonblocking(true)?;
    let link = Link::new();
    let number = duties.clock.realtime().subsec_nanos();
    let client = Client {
        link: Arc::clone(&link),
        channel: Channel::new(stream, number),
        duties,
        pace,
        known: None,
        unanswered: 0,
    };
    std::thread::Builder::new()
        .name("guest-agent".to_owned())
        .spawn(move || client.run())?;
    let port = DeviceEnd {
        stream: device_end,
        link: Arc::clone(&link),
    };
    Ok((Arc::new(port), AgentHandle(link)))
}

/// What a status shows after each of some polls of an agent at the other end of `stream`; none for one that comes to nothing.
#[cfg(feature = "fuzzing")]
pub(crate) fn poll_with(
    stream: UnixStream,
    macs: Vec<[u8; 6]>,
    polls: usize,
) -> Vec<Option<GuestInfo>> {
    let duties = Duties {
        macs,
        set_time: true,
        press_button: Box::new(|| ()),
        clock: Arc::new(crate::clock::SystemClock),
    };
    let mut client = Client {
        link: Link::new(),
        channel: Channel::new(stream, 0),
        duties,
        pace: PACE,
        known: None,
        unanswered: 0,
    };
    let poll = |_| client.ask_all().ok().map(GuestInfo::bounded);
    (0..polls).map(poll).collect()
}

struct Client {
    link: Arc<Link>,
    channel: Channel,
    duties: Duties,
    pace: Pace,
    /// The release of the agent and the operating system, which stay until the agent opens the port anew.
    known: Option<(String, GuestOs)>,
    /// Polls in a row that came to nothing.
    unanswered: u32,
}

impl Client {
    fn run(mut self) {
        let mut next = Instant::now();
        loop {
            match self.link.wait(next) {
                Due::Gone => return,
                Due::Opened => {
                    self.known = None;
                    self.unanswered = 0;
                    self.poll();
                }
                Due::Poll => self.poll(),
                Due::Shutdown => self.shut_down(),
            }
            next = Instant::now() + self.pace.poll;
        }
    }

    fn poll(&mut self) {
        match self.ask_all() {
            Ok(info) => {
                self.unanswered = 0;
                let info = Box::new(info.bounded());
                self.link.publish(GuestAgent::Connected(info));
            }
            Err(failure) => {
                self.unanswered = self.unanswered.saturating_add(1);
                if self.unanswered == UNANSWERED_MAX {
                    tracing::info!(%failure, "the guest's agent does not answer");
                    self.link.publish(GuestAgent::Silent);
                }
            }
        }
    }

    fn ask_all(&mut self) -> Result<GuestInfo, Failure> {
        self.channel.synchronize(self.pace.answer)?;
        if self.duties.set_time {
            self.set_time()?;
        }
        let (agent_version, os) = match &self.known {
            Some(known) => known.clone(),
            None => {
                let info = self.ask::<Info>("guest-info")?;
                let os = self.ask::<OsInfo>("guest-get-osinfo")?.unwrap_or_default();
                let version = info.map(|info| info.version).unwrap_or_default();
                self.known.insert((version, os.into())).clone()
            }
        };
        let host_name = self.ask::<HostName>("guest-get-host-name")?;
        let interfaces = self.ask::<Interfaces>("guest-network-get-interfaces")?;
        Ok(GuestInfo {
            agent_version,
            host_name: host_name.map(|host| host.host_name).unwrap_or_default(),
            os,
            interfaces: interfaces
                .map(|list| list.of(&self.duties.macs))
                .unwrap_or_default(),
        })
    }

    /// The result of a request without arguments; none when the agent refuses it.
    fn ask<T: DeserializeOwned>(&mut self, command: &str) -> Result<Option<T>, Failure> {
        let request = format!(r#"{{"execute":"{command}"}}"#);
        let answer = self.channel.ask(&request, self.pace.answer)?;
        parse(&answer).map_err(Failure::Malformed)
    }

    fn set_time(&mut self) -> Result<(), Failure> {
        let now = self.duties.clock.realtime().as_nanos();
        let request = format!(r#"{{"execute":"guest-set-time","arguments":{{"time":{now}}}}}"#);
        let answer = self.channel.ask(&request, self.pace.answer)?;
        self.duties.set_time = false;
        match parse::<IgnoredAny>(&answer).map_err(Failure::Malformed)? {
            Some(_) => tracing::info!("the guest was told the time"),
            None => tracing::warn!("the guest's agent does not set the clock"),
        }
        Ok(())
    }

    /// Tells the agent to shut the guest down, and presses the power button when that did not do it in time. A guest
    /// that is on its way down ignores the button.
    fn shut_down(&mut self) {
        match self.order_shutdown() {
            Ok(()) => tracing::warn!("the guest's agent refuses to shut the guest down"),
            // An agent that obeys does not answer.
            Err(Failure::TimeIsUp(time)) => {
                tracing::info!(?time, "the guest's agent has not shut the guest down");
            }
            Err(Failure::Gone) => return,
            Err(failure) => tracing::warn!(%failure, "the guest's agent does not obey"),
        }
        (self.duties.press_button)();
    }

    fn order_shutdown(&mut self) -> Result<(), Failure> {
        self.channel.synchronize(self.pace.answer)?;
        tracing::info!("the guest's agent is told to shut the guest down");
        self.channel.ask(SHUTDOWN, self.pace.shutdown).map(drop)
    }
}

/// The name of the port, by which agents look for it.
pub(crate) const PORT: &str = "org.qemu.guest_agent.0";
const SHUTDOWN: &str = r#"{"execute":"guest-shutdown","arguments":{"mode":"powerdown"}}"#;
/// An agent answers in milliseconds, on a busy guest in a second or two. A shutdown by it takes seconds; the operator asks
/// again after 15 s, and presses the button then.
const PACE: Pace = Pace {
    answer: Duration::from_secs(5),
    poll: Duration::from_secs(10),
    shutdown: Duration::from_secs(10),
};
/// Polls in a row without an answer after which the agent counts as silent, and what it said is no longer shown.
const UNANSWERED_MAX: u32 = 3;

#[cfg(test)]
mod tests;
