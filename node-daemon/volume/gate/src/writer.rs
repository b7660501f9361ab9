//! The writer's side of the gate page: `bascule-volume` publishes its node's lease.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bascule_types::{BootTime, Owner, VolumeId};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, ftruncate};
use rustix::io::Errno;

use crate::error::GateError;
use crate::layout::{
    BOOT_ID, EXPIRY, FAILED, LAYOUT_VERSION, MAGIC, MAGIC_VALUE, OWNER, PAGE_BYTES, SEQUENCE_SENT,
    VERSION, VERSION_READER_MIN, VOLUME,
};
use crate::page::Page;
use crate::reader::{
    GateView, io_error, owner_from_word, page_boot_id, verify, view, word_from_owner,
};

/// The gate page, locked for writing. Dropping it releases the lock and leaves the page unchanged.
#[derive(Debug)]
pub struct GateWriter {
    page: Page,
    /// Holds the lock.
    file: OwnedFd,
    path: PathBuf,
}

/// The state in which a writer found the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateTakenOver {
    /// There was no page of this boot: this node has held no lease on the volume since it booted.
    Fresh,
    /// An earlier writer of this boot left its lease: continue with this owner, expiry and sequence.
    Existing(GateView),
}

impl GateWriter {
    /// Opens the page at `path` for `volume` as its only writer: creates it, or takes over the page of
    /// an earlier process. An open gate stays open.
    ///
    /// # Errors
    /// [`GateError::Busy`] while another process holds the lock; [`GateError::OtherVolume`];
    /// [`GateError::BadMagic`] for another kind of file, which is not changed.
    pub fn open(
        path: impl Into<PathBuf>,
        volume: VolumeId,
    ) -> Result<(Self, GateTakenOver), GateError> {
        let path = path.into();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|source| io_error("open", &path, source))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(GateError::Busy { path }),
            Err(source) => return Err(io_error("lock", &path, source)),
        }
        let status = fstat(&file).map_err(|source| io_error("examine", &path, source))?;
        if usize::try_from(status.st_size).unwrap_or(0) < PAGE_BYTES {
            ftruncate(&file, PAGE_BYTES as u64)
                .map_err(|source| io_error("lengthen", &path, source))?;
        }
        let page = Page::map(&file, true).map_err(|source| io_error("map", &path, source))?;
        let writer = Self { page, file, path };
        let found = match verify(&writer.page) {
            Ok(()) => {
                writer.expect_volume(volume)?;
                GateTakenOver::Existing(writer.view())
            }
            Err(GateError::NotReady | GateError::EarlierBoot) => {
                writer.initialise(volume)?;
                GateTakenOver::Fresh
            }
            Err(other) => return Err(other),
        };
        Ok((writer, found))
    }

    fn expect_volume(&self, wanted: VolumeId) -> Result<(), GateError> {
        let found = VolumeId::from_bytes(self.page.load_16(VOLUME));
        if found == wanted {
            Ok(())
        } else {
            Err(GateError::OtherVolume { found, wanted })
        }
    }

    /// Fills a page that no running process reads; stores the magic last.
    fn initialise(&self, volume: VolumeId) -> Result<(), GateError> {
        let page = &self.page;
        page.store(MAGIC, 0);
        page.store(EXPIRY, 0);
        page.store(OWNER, 0);
        page.store(FAILED, 0);
        page.store(SEQUENCE_SENT, 0);
        page.store_16(VOLUME, volume.to_bytes());
        page.store_16(BOOT_ID, page_boot_id()?);
        page.store(VERSION, LAYOUT_VERSION);
        page.store(VERSION_READER_MIN, LAYOUT_VERSION);
        page.store(MAGIC, MAGIC_VALUE);
        Ok(())
    }

    /// Publishes that `owner`'s lease ends at `expiry`. A newer generation of the slot closes the gate
    /// for the older one at once; `BootTime(0)` closes it for every generation.
    ///
    /// # Errors
    /// [`GateError::NotNewer`] for an older generation or another slot: a page serves one slot. The
    /// page is not changed then.
    pub fn publish(&self, owner: Owner, expiry: BootTime) -> Result<(), GateError> {
        let wanted = word_from_owner(owner)?;
        let shown = self.page.load(OWNER);
        if let Some(shown_owner) = owner_from_word(shown)
            && (shown_owner.slot != owner.slot || shown_owner.generation > owner.generation)
        {
            return Err(GateError::NotNewer {
                shown: shown_owner,
                requested: owner,
            });
        }
        if shown != wanted {
            self.page.store(EXPIRY, 0);
            self.page.store(OWNER, wanted);
        }
        self.page.store(EXPIRY, expiry.0);
        Ok(())
    }

    /// Closes the gate. Writes that were submitted before are not affected.
    pub fn close(&self) {
        self.page.store(EXPIRY, 0);
    }

    /// Records that heartbeat `sequence` is about to be submitted, so that no later process sends the
    /// same number again (rule R3).
    ///
    /// # Ordering
    /// Call it before the submission.
    pub fn record_sequence_sent(&self, sequence: u64) {
        self.page.raise(SEQUENCE_SENT, sequence);
    }

    /// Closes the gate until [`GateWriter::clear_failed`], because a metadata write or flush failed.
    pub fn mark_failed(&self) {
        self.page.store(FAILED, 1);
    }

    /// Ends the effect of [`GateWriter::mark_failed`], after the volume was re-opened and re-verified.
    pub fn clear_failed(&self) {
        self.page.store(FAILED, 0);
    }

    /// The page's contents.
    #[must_use]
    pub fn view(&self) -> GateView {
        view(&self.page)
    }

    /// The path of the page's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A read-only descriptor of the page, for a process that writes to the volume.
    ///
    /// # Errors
    /// [`GateError::Io`].
    pub fn reader_fd(&self) -> Result<OwnedFd, GateError> {
        // By descriptor: the path may name another file by now.
        let own = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&self.file)
        );
        rustix::fs::open(&own, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| io_error("re-open", &self.path, source))
    }
}

impl AsFd for GateWriter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
