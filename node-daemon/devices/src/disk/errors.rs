//! What an error of a command means for the request, and waiting for a lost path.

use std::io;
use std::time::{Duration, Instant};

/// What becomes of a command that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing was done: submit it again.
    Again,
    /// The path to the device is lost, not the data: submit it again while the guest waits.
    Path,
    /// The guest's error: for example of the medium, at this place.
    Request,
}

/// The meaning of an error. Linux names block errors in `blk_errors` (block/blk-core.c):
/// `BLK_STS_TRANSPORT` is `ENOLINK`, `BLK_STS_TIMEOUT` is `ETIMEDOUT`, `BLK_STS_OFFLINE` is `ENODEV`,
/// `BLK_STS_RESV_CONFLICT` is `EBADE`; `BLK_STS_MEDIUM` (`ENODATA`), `BLK_STS_TARGET` (`EREMOTEIO`),
/// `BLK_STS_PROTECTION` (`EILSEQ`), `BLK_STS_NOSPC` (`ENOSPC`) and whatever is unspecified (`EIO`) are
/// of the request.
pub(super) fn meaning(error: &io::Error) -> Meaning {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => Meaning::Again,
        Some(
            libc::ENOLINK
            | libc::ETIMEDOUT
            | libc::ENODEV
            | libc::ENXIO
            | libc::EBADE
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::ENOTCONN
            | libc::ESHUTDOWN
            | libc::ECONNRESET,
        ) => Meaning::Path,
        _ => Meaning::Request,
    }
}

/// The path to the device is lost: nothing is submitted before the next attempt.
#[derive(Debug)]
pub(super) struct LostPath {
    retry_at: Instant,
}

impl LostPath {
    /// From `now` on.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            retry_at: now + PATH_RETRY,
        }
    }

    /// How long to wait for the next attempt; none when it is due.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let left = self.retry_at.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }
}

/// Whether a write or flush has failed: the first failure is returned once.
#[derive(Debug)]
pub(super) enum Failure {
    None,
    /// Not yet returned: the operation and the error.
    New(&'static str, String),
    Reported,
}

impl Failure {
    pub(super) fn note(&mut self, operation: &'static str, error: &io::Error) {
        if matches!(self, Self::None) {
            *self = Self::New(operation, error.to_string());
        }
    }

    pub(super) fn take(&mut self) -> Option<(&'static str, String)> {
        match std::mem::replace(self, Self::Reported) {
            Self::New(operation, error) => Some((operation, error)),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// Between two attempts. A guess: a path that comes back is used within a second, and a path that
/// does not costs next to nothing.
const PATH_RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_sector_is_the_guests_and_a_lost_path_is_not() {
        let of = |errno| meaning(&io::Error::from_raw_os_error(errno));
        for errno in [
            libc::EIO,
            libc::ENODATA,
            libc::EREMOTEIO,
            libc::EILSEQ,
            libc::ENOSPC,
        ] {
            assert_eq!(of(errno), Meaning::Request, "{errno}");
        }
        for errno in [
            libc::ENOLINK,
            libc::ETIMEDOUT,
            libc::ENODEV,
            libc::EHOSTDOWN,
            libc::EBADE,
        ] {
            assert_eq!(of(errno), Meaning::Path, "{errno}");
        }
        for errno in [libc::EAGAIN, libc::EINTR] {
            assert_eq!(of(errno), Meaning::Again, "{errno}");
        }
        let end = io::Error::new(io::ErrorKind::UnexpectedEof, "end of the device");
        assert_eq!(meaning(&end), Meaning::Request);
    }

    #[test]
    fn a_lost_path_is_tried_again_when_its_time_has_come() {
        let now = Instant::now();
        let path = LostPath::new(now);
        assert_eq!(path.wait(now), Some(PATH_RETRY));
        assert_eq!(path.wait(now + PATH_RETRY), None);
    }
}
