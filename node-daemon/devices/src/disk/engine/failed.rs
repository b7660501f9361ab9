//! What becomes of a command that failed.
//!
//! Linux says `EIO` for a bad place on a disk, and also for a disk that is lost as a whole: of a SCSI device whose
//! transport it has given up ("rejecting I/O to offline device", measured with open-iscsi on Linux 6.12), and of a
//! multipath device without paths that does not queue. So after an `EIO` a block is read that can be read as long
//! as the device is there ([`super::Disk::probe_offset`]). If that fails too, the path is lost. If not, the path may
//! have come back between the two, so the command is submitted once more: only a second `EIO` is of the request.

use std::io;

use bascule_types::AlignedBuffer;

use super::super::errors::{Meaning, meaning};
use super::super::job::SubRequestKind;
use super::super::ring::{Command, HostRun, Ring};
use super::super::rules::{Rules, broken};
use super::DiskEngine;

/// Sub-requests that failed with `EIO`, until it is known whether the device is there.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    waiting: Vec<(usize, io::Error)>,
    /// Where the probe reads to, while it is in flight.
    probe: Option<AlignedBuffer>,
}

impl Suspects {
    /// Drops all of them. No probe may be in flight.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

impl<R: Ring> DiskEngine<R> {
    pub(super) fn command_failed(&mut self, key: usize, error: io::Error) {
        let Some(sub_request) = self.sub_requests.get_mut(key) else {
            return;
        };
        let (job, kind) = (sub_request.job, sub_request.kind);
        match judge(self.rules, &error) {
            Meaning::Again if sub_request.retries < RETRIES_MAX => {
                sub_request.retries += 1;
                self.ready.push(key, kind.is_write());
            }
            // A flush that is tried again may succeed although what it was for is lost.
            _ if kind == SubRequestKind::Sync => self.sub_request_finished(key, Err(error)),
            Meaning::Path => self.path_lost(key, (job, kind), &error),
            Meaning::Unclear => {
                self.note_failure(job, kind, &error);
                self.suspects.waiting.push((key, error));
            }
            Meaning::Again | Meaning::Request => self.request_failed(key, (job, kind), error),
        }
    }

    fn path_lost(&mut self, key: usize, (job, kind): Part, error: &io::Error) {
        if self.held_back.path_lost(self.ring.now()) {
            tracing::warn!(%error, "the path to the disk is lost: the guest waits");
        }
        self.note_failure(job, kind, error);
        self.ready.push(key, kind.is_write());
    }

    fn request_failed(&mut self, key: usize, (job, kind): Part, error: io::Error) {
        if self.disk.errors.pauses() {
            self.held_back.hold(kind.operation(), &error);
            self.note_failure(job, kind, &error);
            self.ready.push(key, kind.is_write());
        } else {
            self.sub_request_finished(key, Err(error));
        }
    }

    /// Pushes the read of the block that tells whether the device is there, if that is to be known. Returns the number of
    /// commands pushed.
    #[expect(unsafe_code, reason = "io_uring takes raw addresses")]
    pub(super) fn push_probe(&mut self) -> io::Result<usize> {
        let is_wanted = !self.suspects.waiting.is_empty() && self.suspects.probe.is_none();
        if !is_wanted || !self.ring.has_room() {
            return Ok(0);
        }
        let length = usize::try_from(self.disk.block_bytes).map_err(io::Error::other)?;
        let buffer = self
            .suspects
            .probe
            .insert(AlignedBuffer::new(length, length));
        let runs = [HostRun::of(buffer.bytes_mut())];
        let command = Command::Read {
            runs: &runs,
            offset: self.disk.probe_offset,
        };
        let tag = u64::try_from(PROBE).map_err(io::Error::other)?;
        // SAFETY: the buffer is neither moved, read nor dropped before the completion has been reaped: dropping the
        // engine waits for it, or leaks the buffer.
        let pushed = unsafe { self.ring.push(command, tag) };
        pushed.map(|()| 1)
    }

    /// The device is there if the probe brought no `error`: then the errors are of the requests.
    pub(super) fn probe_answered(&mut self, error: Option<&io::Error>) {
        self.suspects.probe = None;
        let answer = error.map(meaning);
        if answer == Some(Meaning::Again) {
            // The next submission probes again.
            return;
        }
        for (key, error) in std::mem::take(&mut self.suspects.waiting) {
            let Some(sub_request) = self.sub_requests.get_mut(key) else {
                continue;
            };
            let part = (sub_request.job, sub_request.kind);
            let is_second = std::mem::replace(&mut sub_request.is_suspect, answer.is_none());
            match answer {
                Some(_) => self.path_lost(key, part, &error),
                None if is_second || broken!(self.rules, EioJudgedAtOnce) => {
                    self.request_failed(key, part, error);
                }
                None => self.ready.push(key, part.1.is_write()),
            }
        }
    }
}

/// A sub-request's job and kind.
type Part = (usize, SubRequestKind);

/// What the error means, by the rules in force.
fn judge(rules: Rules, error: &io::Error) -> Meaning {
    match meaning(error) {
        Meaning::Unclear if broken!(rules, EioWithoutProbe) => Meaning::Request,
        Meaning::Unclear if broken!(rules, EioIsLostPath) => Meaning::Path,
        Meaning::Path if broken!(rules, PathErrorShown) => Meaning::Request,
        meaning => meaning,
    }
}

/// The key of the probe, which no sub-request has.
pub(super) const PROBE: usize = usize::MAX;
/// Retries of a command after `EAGAIN` or `EINTR`. A guess; the kernel retries most of them itself.
const RETRIES_MAX: u32 = 16;
