//! The page in which one process says whether writes of it are under way, version 1.
//!
//! # Constraints
//! - As for the gate page ([`crate::layout`]): 4096 bytes, mapped `MAP_SHARED`, naturally aligned
//!   64-bit words in the host's byte order, sequentially consistent atomic accesses only. It outlives
//!   both processes; a reboot makes it meaningless, and `bascule-volume` then removes it.
//! - The process that it belongs to, the *writer*, may die between any two instructions. The page then
//!   says that more is under way than is, never less.
//!
//! # Byte table
//!
//! | offset | bytes | field | written | meaning |
//! |---|---|---|---|---|
//! | 0 | 8 | `magic` | at creation, last | `BSCLWRTR`; 0 means "not ready" |
//! | 8 | 8 | `version` | at creation | the layout's version: 1 |
//! | 16 | 8 | `version_reader_min` | at creation | the lowest version that may use this page: 1 |
//! | 24 | 40 | | | zero |
//! | 64 | 8 | `attached` | by the writer, once | not 0: the writer keeps this page; 0 says nothing |
//! | 72 | 8 | `active` | by the writer | how many of its threads may have a write submitted |
//! | 80 | 8 | `unclean` | by the writer | not 0, for good: a write or flush failed |
//! | 88 | 4008 | | | zero |
//!
//! # Ordering
//! A thread of the writer raises `active`, *then* samples the clock, *then* checks the gate page, then
//! submits; it lowers `active` when none of its writes is in flight. A reader that samples the clock,
//! sees that the lease has ended, makes sure that no later expiry is published, and *then* loads
//! `active` as 0, knows that no write is in flight and that none will be submitted: a thread that
//! raises `active` after that load samples the clock later still, and finds the gate closed. All
//! accesses are of one total order, but the sampling of the clock is not a memory access. So the reader
//! acts only when the lease ended [`LAPSED_FOR`] ago: far longer than a processor reorders anything.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use bascule_types::{BootTime, WriterState};
use rustix::fs::{Mode, OFlags, fstat, ftruncate};

use crate::error::GateError;
use crate::layout::{MAGIC, PAGE_BYTES, VERSION, VERSION_READER_MIN};
use crate::page::Page;
use crate::reader::io_error;

/// For how long a lease must have ended before `active` is believed.
pub const LAPSED_FOR: Duration = Duration::from_millis(100);

const ATTACHED: usize = 64;
const ACTIVE: usize = 72;
const UNCLEAN: usize = 80;
const WRITER_MAGIC: u64 = u64::from_le_bytes(*b"BSCLWRTR");
const WRITER_VERSION: u64 = 1;

/// A writer page, mapped.
#[derive(Debug)]
pub struct WriterPage {
    page: Page,
}

/// What a writer page says at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriterView {
    /// Whether the writer keeps the page; if not, the rest means nothing.
    pub attached: bool,
    /// How many threads may have a write submitted.
    pub active: u64,
    /// Whether every write and flush has succeeded.
    pub state: WriterState,
}

impl WriterView {
    /// Whether it is certain that no write is in flight and that none failed. For a living writer,
    /// only while its gate is closed for certain ([`is_closed_for_certain`]).
    #[must_use]
    pub fn is_drained(self) -> bool {
        self.attached && self.active == 0 && self.state == WriterState::Clean
    }
}

/// Whether a lease that ends at `expiry` ended long enough before `now` to believe writer pages that
/// are loaded after `now` was sampled.
///
/// # Assumes
/// Nobody publishes a later expiry before the caller has acted.
#[must_use]
pub fn is_closed_for_certain(now: BootTime, expiry: BootTime) -> bool {
    now >= expiry.after(LAPSED_FOR)
}

impl WriterPage {
    /// The page at `path`, which is created if it is not there. For `bascule-volume`.
    ///
    /// # Errors
    /// Those of the file system; [`GateError::BadMagic`] for another kind of file.
    pub fn create(path: &Path) -> Result<(Self, OwnedFd), GateError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|source| io_error("open", path, source))?;
        let status = fstat(&file).map_err(|source| io_error("examine", path, source))?;
        if usize::try_from(status.st_size).unwrap_or(0) < PAGE_BYTES {
            ftruncate(&file, PAGE_BYTES as u64)
                .map_err(|source| io_error("lengthen", path, source))?;
        }
        let page = Page::map(&file, true).map_err(|source| io_error("map", path, source))?;
        if page.load(MAGIC) == 0 {
            page.store(VERSION, WRITER_VERSION);
            page.store(VERSION_READER_MIN, WRITER_VERSION);
            page.store(MAGIC, WRITER_MAGIC);
        }
        Ok((Self::verified(page)?, file))
    }

    /// Maps the page of a descriptor that was received over a socket, closes the descriptor, and says
    /// in the page that this process keeps it from now on. For the writer, before its first write.
    ///
    /// # Errors
    /// [`GateError`] when it is not ready or of a newer release.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "ownership says that it is closed"
    )]
    pub fn attach(file: OwnedFd) -> Result<Self, GateError> {
        let path = Path::new("");
        let status = fstat(&file).map_err(|source| io_error("examine", path, source))?;
        if usize::try_from(status.st_size).unwrap_or(0) < PAGE_BYTES {
            return Err(GateError::NotReady);
        }
        let page = Page::map(&file, true).map_err(|source| io_error("map", path, source))?;
        let page = Self::verified(page)?;
        page.page.store(ATTACHED, 1);
        Ok(page)
    }

    fn verified(page: Page) -> Result<Self, GateError> {
        let needed = page.load(VERSION_READER_MIN);
        match page.load(MAGIC) {
            WRITER_MAGIC if needed > WRITER_VERSION => Err(GateError::TooNew {
                needed,
                known: WRITER_VERSION,
            }),
            WRITER_MAGIC => Ok(Self { page }),
            0 => Err(GateError::NotReady),
            _ => Err(GateError::BadMagic),
        }
    }

    /// A thread is about to sample the clock and to check the gate for a write. Once per thread until
    /// [`WriterPage::writes_ended`].
    pub fn write_begins(&self) {
        self.page.add(ACTIVE, 1);
    }

    /// None of that thread's writes is in flight.
    pub fn writes_ended(&self) {
        self.page.subtract(ACTIVE, 1);
    }

    /// A write or flush failed, or its outcome is unknown.
    pub fn write_failed(&self) {
        self.page.store(UNCLEAN, 1);
    }

    /// What the page says now.
    #[must_use]
    pub fn view(&self) -> WriterView {
        // `unclean` last: it is raised before `active` is lowered.
        let attached = self.page.load(ATTACHED) != 0;
        let active = self.page.load(ACTIVE);
        let state = match self.page.load(UNCLEAN) {
            0 => WriterState::Clean,
            _ => WriterState::Unclean,
        };
        WriterView {
            attached,
            active,
            state,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> (WriterPage, OwnedFd, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let (page, file) = WriterPage::create(&directory.path().join("page")).unwrap();
        (page, file, directory)
    }

    #[test]
    fn a_page_proves_nothing_until_its_writer_has_attached() {
        let (page, file, _directory) = page();
        assert_eq!(page.view(), WriterView::default());
        assert!(!page.view().is_drained());
        let writer = WriterPage::attach(file).unwrap();
        assert!(page.view().is_drained());
        writer.write_begins();
        writer.write_begins();
        writer.writes_ended();
        assert_eq!(page.view().active, 1);
        assert!(!page.view().is_drained());
        writer.writes_ended();
        assert!(page.view().is_drained());
        writer.write_failed();
        assert!(!page.view().is_drained());
    }

    #[test]
    fn a_page_outlives_its_writer_and_its_creator() {
        let (page, file, directory) = page();
        let writer = WriterPage::attach(file).unwrap();
        writer.write_begins();
        drop((writer, page));
        let (again, _file) = WriterPage::create(&directory.path().join("page")).unwrap();
        let view = again.view();
        assert_eq!((view.attached, view.active), (true, 1));
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("page");
        std::fs::write(&path, [7; PAGE_BYTES]).unwrap();
        let error = WriterPage::create(&path).unwrap_err();
        assert!(matches!(error, GateError::BadMagic), "{error}");
    }

    #[test]
    fn a_lease_is_over_for_certain_some_time_after_its_end() {
        let end = BootTime(1_000_000_000);
        assert!(!is_closed_for_certain(end, end));
        assert!(is_closed_for_certain(end.after(LAPSED_FOR), end));
    }
}
