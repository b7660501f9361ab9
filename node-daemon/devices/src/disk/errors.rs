//! What an error of a command means for the request, and waiting for a lost path.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bascule_types::OnError;

/// What a disk does when the device fails a read or a write. Shared with who may change it.
#[derive(Debug, Default)]
pub struct ErrorPolicy {
    pauses: AtomicBool,
}

impl ErrorPolicy {
    /// The policy to begin with.
    #[must_use]
    pub fn new(on_error: OnError) -> Self {
        let policy = Self::default();
        policy.set(on_error);
        policy
    }

    /// Changes it for every later error.
    pub fn set(&self, on_error: OnError) {
        self.pauses
            .store(on_error == OnError::Pause, Ordering::Relaxed);
    }

    pub(super) fn pauses(&self) -> bool {
        self.pauses.load(Ordering::Relaxed)
    }
}

/// Why nothing is submitted: the guest waits.
#[derive(Debug, Default)]
pub(super) struct HeldBack {
    /// Until the path to the device is tried again.
    lost_path: Option<LostPath>,
    /// A request failed while the policy was to pause: until it is to be tried again.
    is_held: bool,
    /// Of that request, not yet returned.
    new: Option<(&'static str, String)>,
}

impl HeldBack {
    /// The path is lost from `now` on. Whether that is news.
    pub(super) fn path_lost(&mut self, now: Instant) -> bool {
        self.lost_path.replace(LostPath::new(now)).is_none()
    }

    /// Whether nothing may be submitted at `now`. Once the path is due, it is tried with everything.
    pub(super) fn blocks(&mut self, now: Instant) -> bool {
        let waits = self.lost_path.as_ref().and_then(|path| path.wait(now));
        if self.is_held || waits.is_some() {
            return true;
        }
        self.lost_path = None;
        false
    }

    /// When to look again, at the path or at a closed gate; never while a request is held.
    pub(super) fn poll_after(&self, now: Instant) -> Option<Duration> {
        let wait = self.lost_path.as_ref().and_then(|path| path.wait(now));
        (!self.is_held).then_some(wait.unwrap_or(GATE_POLL))
    }

    pub(super) fn hold(&mut self, operation: &'static str, error: &io::Error) {
        if !std::mem::replace(&mut self.is_held, true) {
            self.new = Some((operation, error.to_string()));
        }
    }

    /// Ends the hold.
    pub(super) fn retry(&mut self) {
        (self.is_held, self.new) = (false, None);
    }

    pub(super) fn take(&mut self) -> Option<(&'static str, String)> {
        self.new.take()
    }
}

/// What becomes of a command that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing was done: submit it again.
    Again,
    /// The path to the device is lost, not the data: submit it again while the guest waits.
    Path,
    /// The guest's error: for example of the medium, at this place.
    Request,
    /// Either of the two: to be found out.
    Unclear,
}

/// The meaning of an error. Linux names block errors in `blk_errors` (block/blk-core.c):
/// `BLK_STS_TRANSPORT` is `ENOLINK`, `BLK_STS_TIMEOUT` is `ETIMEDOUT`, `BLK_STS_OFFLINE` is `ENODEV`,
/// `BLK_STS_RESV_CONFLICT` is `EBADE`; `BLK_STS_MEDIUM` (`ENODATA`), `BLK_STS_TARGET` (`EREMOTEIO`),
/// `BLK_STS_PROTECTION` (`EILSEQ`) and `BLK_STS_NOSPC` (`ENOSPC`) are of the request. Whatever is unspecified is
/// `EIO`, a bad place as well as a device that is offline.
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
        Some(libc::EIO) => Meaning::Unclear,
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

/// Poll interval of a closed gate: far below the length of a lease, far above the cost of a check.
pub(super) const GATE_POLL: Duration = Duration::from_millis(5);
/// Between two attempts. A guess: a path that comes back is used within a second, and a path that
/// does not costs next to nothing.
const PATH_RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_sector_is_the_guests_and_a_lost_path_is_not() {
        let of = |errno| meaning(&io::Error::from_raw_os_error(errno));
        for errno in [libc::ENODATA, libc::EREMOTEIO, libc::EILSEQ, libc::ENOSPC] {
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
        assert_eq!(of(libc::EIO), Meaning::Unclear);
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
