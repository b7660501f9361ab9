//! Which connections are there, so that a login takes the place of an older session of the same initiator port.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use super::SanPath;

/// Initiator name, ISID, portal.
type Port = (String, [u8; 6], SanPath);

/// Sessions by initiator port.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<BTreeMap<Port, Arc<Tasks>>>);

/// The commands of one session that have been received and not answered.
#[derive(Debug)]
pub(super) struct Tasks {
    stream: TcpStream,
    open: Mutex<Open>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    tasks: u32,
    closed: bool,
}

impl Sessions {
    /// Ends the older session of this port, waits until none of its commands can take effect any more, and enters the
    /// new one (RFC 7143 §6.3.5: session reinstatement).
    pub(super) fn reinstate(&self, port: Port, stream: &TcpStream) -> Result<Arc<Tasks>> {
        let stream = stream.try_clone().context("duplicate a connection")?;
        let new = Arc::new(Tasks {
            stream,
            open: Mutex::default(),
            changed: Condvar::new(),
        });
        let old = lock(&self.0).insert(port, Arc::clone(&new));
        if let Some(old) = old {
            old.close();
        }
        Ok(new)
    }
}

impl Tasks {
    /// A command begins; false if the session has ended, and the command must not be performed.
    pub(super) fn begin(&self) -> bool {
        let mut open = lock(&self.open);
        open.tasks += u32::from(!open.closed);
        !open.closed
    }

    /// A command that [`Self::begin`] allowed has been performed.
    pub(super) fn end(&self) {
        lock(&self.open).tasks -= 1;
        self.changed.notify_all();
    }

    /// Waits until every command that was received has been performed.
    pub(super) fn wait_idle(&self) {
        let busy = |open: &mut Open| open.tasks > 0;
        drop(self.changed.wait_while(lock(&self.open), busy));
    }

    fn close(&self) {
        lock(&self.open).closed = true;
        // The other end may have closed it already.
        drop(self.stream.shutdown(Shutdown::Both));
        self.wait_idle();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_session_that_was_replaced_performs_no_further_command() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let sessions = Sessions::default();
        let port = || ("iqn:n1".to_owned(), [1; 6], SanPath::A);
        let old = sessions.reinstate(port(), &stream).unwrap();
        assert!(old.begin());
        old.end();
        let new = sessions.reinstate(port(), &stream).unwrap();
        assert!(!old.begin() && new.begin());
        let other = ("iqn:n2".to_owned(), [1; 6], SanPath::A);
        sessions.reinstate(other, &stream).unwrap();
        new.end();
        assert!(new.begin());
    }
}
