//! Errors of `accept(2)` in a loop: one that persists, such as no free file descriptor, must neither keep a
//! CPU busy nor fill the log.

use std::io;
use std::time::Duration;

/// The errors of one listener.
#[derive(Debug, Default)]
pub struct AcceptErrors {
    /// The system's number of the last error since a connection was accepted.
    last: Option<Option<i32>>,
}

impl AcceptErrors {
    /// A connection was accepted.
    pub const fn accepted(&mut self) {
        self.last = None;
    }

    /// Pauses before the next attempt. Returns whether the error is to be logged: it is not the same as
    /// the one before.
    #[must_use]
    pub fn pause(&mut self, error: &io::Error) -> bool {
        let (new, pause) = self.failed(error);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        new
    }

    fn failed(&mut self, error: &io::Error) -> (bool, Duration) {
        let number = error.raw_os_error();
        let new = self.last.replace(number) != Some(number);
        let pause = match error.kind() {
            // The client's doing; the next connection may be waiting.
            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => Duration::ZERO,
            _ => PAUSE,
        };
        (new, pause)
    }
}

/// Long enough to cost nothing, and short against every time limit of a client.
const PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    /// A VM's process without a free file descriptor used a whole CPU for its log.
    #[test]
    fn an_error_that_persists_is_logged_once_and_followed_by_a_pause() {
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        const ECONNABORTED: i32 = 103;
        let mut errors = AcceptErrors::default();
        let mut failed = |number| errors.failed(&io::Error::from_raw_os_error(number));
        assert_eq!(failed(EMFILE), (true, PAUSE));
        assert_eq!(failed(EMFILE), (false, PAUSE));
        assert_eq!(failed(ENFILE), (true, PAUSE));
        assert_eq!(failed(ECONNABORTED), (true, Duration::ZERO));
        errors.accepted();
        let again = io::Error::from_raw_os_error(ECONNABORTED);
        assert!(errors.failed(&again).0);
    }
}
