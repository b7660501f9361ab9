//! Which of those who connect to a destination is the source.
//!
//! Every connection is greeted in a thread of its own and within one deadline, so that a peer that is
//! slow, or sends a byte now and then, delays no other one.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use bascule_ipc::AcceptErrors;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Connections that are greeted at the same time. One more, and the oldest is dropped.
const GREETED_MAX: usize = 16;
/// From accepting a connection to the end of its greeting. A handshake between emulated nodes takes seconds.
const DEADLINE: Duration = Duration::from_secs(15);
/// Interval at which cancelling and deadlines are checked.
const POLL_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// Accepts connections until `greet` returns something for one; it is called in threads, and
/// returns none for whoever is not the source. None when `is_cancelled`.
///
/// # Errors
/// When the listener cannot be waited for.
pub(super) fn admit<T: Send>(
    listener: &TcpListener,
    is_cancelled: impl Fn() -> bool,
    greet: impl Fn(TcpStream, SocketAddr) -> Option<T> + Sync,
) -> io::Result<Option<T>> {
    listener.set_nonblocking(true)?;
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let greet = |tcp, peer, found: &Sender<(SocketAddr, T)>| {
        if let Some(admitted) = greet(tcp, peer) {
            // Fails only when another one was admitted.
            drop(found.send((peer, admitted)));
            rustix::io::write(&wake, &1_u64.to_le_bytes()).ok();
        }
    };
    let (found, admitted) = mpsc::channel();
    thread::scope(|scope| {
        let mut guests = Greeted::default();
        let mut errors = AcceptErrors::default();
        loop {
            let mut ready = [
                PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN),
            ];
            match poll(&mut ready, Some(&POLL_INTERVAL)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if let Ok((peer, admitted)) = admitted.try_recv() {
                guests.0.retain(|applicant| applicant.peer != peer);
                return Ok(Some(admitted));
            }
            if is_cancelled() {
                return Ok(None);
            }
            guests.drop_overdue(Instant::now());
            match listener.accept() {
                Ok((tcp, peer)) => {
                    errors.accepted();
                    let (greet, found) = (&greet, found.clone());
                    guests.greet(scope, tcp, peer, move |tcp| greet(tcp, peer, &found));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if errors.pause(&error) => {
                    tracing::warn!(%error, "a connection was lost before it was accepted");
                }
                Err(_) => {}
            }
        }
    })
}

/// The connections that are being greeted, oldest first. Dropped, it ends them.
#[derive(Default)]
struct Greeted<'scope>(VecDeque<Applicant<'scope>>);

struct Applicant<'scope> {
    peer: SocketAddr,
    since: Instant,
    /// Shut down to end its greeting.
    socket: TcpStream,
    thread: ScopedJoinHandle<'scope, ()>,
}

impl<'scope> Greeted<'scope> {
    fn greet(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        tcp: TcpStream,
        peer: SocketAddr,
        greet: impl FnOnce(TcpStream) + Send + 'scope,
    ) {
        if self.0.len() >= GREETED_MAX
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.end("too many connections");
        }
        let begun = tcp.set_nonblocking(false).and_then(|()| {
            let socket = tcp.try_clone()?;
            let builder = thread::Builder::new().name("greeting".to_owned());
            let thread = builder.spawn_scoped(scope, move || greet(tcp))?;
            Ok(Applicant {
                peer,
                since: Instant::now(),
                socket,
                thread,
            })
        });
        match begun {
            Ok(applicant) => self.0.push_back(applicant),
            Err(error) => tracing::warn!(%error, %peer, "a connection cannot be greeted"),
        }
    }

    fn drop_overdue(&mut self, now: Instant) {
        self.0.retain(|applicant| {
            let overdue = now.duration_since(applicant.since) > DEADLINE;
            if overdue {
                applicant.end("it took too long");
            }
            !overdue && !applicant.thread.is_finished()
        });
    }
}

impl Drop for Greeted<'_> {
    fn drop(&mut self) {
        for applicant in &self.0 {
            applicant.end("the wait is over");
        }
    }
}

impl Applicant<'_> {
    fn end(&self, reason: &str) {
        if !self.thread.is_finished() {
            tracing::warn!(peer = %self.peer, reason, "a connection is given up");
            // Fails only when the peer has ended it.
            drop(self.socket.shutdown(Shutdown::Both));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const NEVER: Duration = Duration::from_secs(60);

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Admits who sends a `y`, and waits for it.
    fn greet(mut tcp: TcpStream, peer: SocketAddr) -> Option<SocketAddr> {
        tcp.set_read_timeout(Some(NEVER)).unwrap();
        let mut byte = [0];
        let admitted = tcp.read(&mut byte).is_ok_and(|length| length == 1) && byte == *b"y";
        admitted.then_some(peer)
    }

    fn is_dropped(stream: &mut TcpStream) -> bool {
        stream.set_read_timeout(Some(NEVER)).unwrap();
        stream.read(&mut [0]).is_ok_and(|length| length == 0)
    }

    /// A destination greeted one connection at a time: a peer that sent a byte every four seconds kept the
    /// source out.
    #[test]
    fn peers_that_send_nothing_delay_nobody_and_are_dropped_at_the_end() {
        let (listener, address) = listener();
        let mut silent: Vec<_> = (0..3)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        let mut wrong = TcpStream::connect(address).unwrap();
        wrong.write_all(b"n").unwrap();
        let mut source = TcpStream::connect(address).unwrap();
        source.write_all(b"y").unwrap();
        let admitted = admit(&listener, || false, greet).unwrap();
        assert_eq!(admitted, Some(source.local_addr().unwrap()));
        assert!(silent.iter_mut().all(is_dropped));
        // The admitted one is not shut down with the others.
        source.write_all(b"still open").unwrap();
    }

    #[test]
    fn one_connection_too_many_drops_the_oldest() {
        let (listener, address) = listener();
        let cancelled = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| admit(&listener, || cancelled.load(Ordering::Relaxed), greet));
            let mut peers: Vec<_> = (0..=GREETED_MAX)
                .map(|_| TcpStream::connect(address).unwrap())
                .collect();
            assert!(is_dropped(&mut peers[0]));
            peers[1].set_nonblocking(true).unwrap();
            let error = peers[1].read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            cancelled.store(true, Ordering::Relaxed);
            peers[1].set_nonblocking(false).unwrap();
            assert!(peers.iter_mut().skip(1).all(is_dropped));
        });
    }

    #[test]
    fn a_greeting_that_takes_too_long_is_given_up() {
        let (listener, address) = listener();
        let mut slow = TcpStream::connect(address).unwrap();
        let (tcp, peer) = listener.accept().unwrap();
        thread::scope(|scope| {
            let mut greeted = Greeted::default();
            greeted.greet(scope, tcp, peer, move |tcp| {
                assert!(greet(tcp, peer).is_none())
            });
            greeted.drop_overdue(Instant::now());
            assert_eq!(greeted.0.len(), 1);
            greeted.drop_overdue(Instant::now() + DEADLINE + Duration::from_millis(1));
            assert!(greeted.0.is_empty() && is_dropped(&mut slow));
        });
    }
}
