//! The writer's side: `bascule-volume` publishes its lease here.

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
use crate::reader::{GateView, boot_id, io_error, owner_from_word, verify, view, word_from_owner};

/// The gate page, held for writing. Dropping it gives the lock up and leaves the page as it is.
#[derive(Debug)]
pub struct GateWriter {
    page: Page,
    /// Keeps the lock.
    file: OwnedFd,
    path: PathBuf,
}

/// What a writer found when it opened the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateTakenOver {
    /// There was no page of this boot: nothing on this host holds a lease on the volume.
    Fresh,
    /// An earlier writer of this boot left its lease: go on with this owner, expiry and sequence.
    Existing(GateView),
}

impl GateWriter {
    /// Open the page at `path` for `volume` as its only writer: make it, or take over what an
    /// earlier process left. Gates that are open stay open.
    ///
    /// # Errors
    /// [`GateError::Busy`] while another process holds it; [`GateError::OtherVolume`];
    /// [`GateError::BadMagic`] for a file that is no gate page (it is left alone).
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

    /// Fill a page that no living process reads: the magic is stored last.
    fn initialise(&self, volume: VolumeId) -> Result<(), GateError> {
        let page = &self.page;
        page.store(MAGIC, 0);
        page.store(EXPIRY, 0);
        page.store(OWNER, 0);
        page.store(FAILED, 0);
        page.store(SEQUENCE_SENT, 0);
        page.store_16(VOLUME, volume.to_bytes());
        page.store_16(BOOT_ID, boot_id()?);
        page.store(VERSION, LAYOUT_VERSION);
        page.store(VERSION_READER_MIN, LAYOUT_VERSION);
        page.store(MAGIC, MAGIC_VALUE);
        Ok(())
    }

    /// Publish that `owner`'s lease ends at `expiry`. A newer generation of the same slot closes
    /// the gate for the older one at once; `BootTime(0)` closes it for everybody.
    ///
    /// # Errors
    /// [`GateError::NotNewer`] for an older generation or another slot: a page serves one slot
    /// for its whole life. Nothing is changed then.
    pub fn publish(&self, owner: Owner, expiry: BootTime) -> Result<(), GateError> {
        let asked = word_from_owner(owner)?;
        let shown = self.page.load(OWNER);
        if let Some(shown_owner) = owner_from_word(shown)
            && (shown_owner.slot != owner.slot || shown_owner.generation > owner.generation)
        {
            return Err(GateError::NotNewer {
                shown: shown_owner,
                asked: owner,
            });
        }
        if shown != asked {
            self.page.store(EXPIRY, 0);
            self.page.store(OWNER, asked);
        }
        self.page.store(EXPIRY, expiry.0);
        Ok(())
    }

    /// Close the gate for everybody. Writes that were submitted before go on.
    pub fn close(&self) {
        self.page.store(EXPIRY, 0);
    }

    /// Record that heartbeat `sequence` is about to be submitted, so that no later process sends
    /// the same number again.
    ///
    /// # Ordering
    /// Call it before the submission.
    pub fn record_sequence_sent(&self, sequence: u64) {
        self.page.raise(SEQUENCE_SENT, sequence);
    }

    /// Close the gate until [`GateWriter::clear_failed`]: a metadata write or flush failed.
    pub fn mark_failed(&self) {
        self.page.store(FAILED, 1);
    }

    /// The volume was re-opened and re-verified.
    pub fn clear_failed(&self) {
        self.page.store(FAILED, 0);
    }

    /// What the page shows.
    #[must_use]
    pub fn view(&self) -> GateView {
        view(&self.page)
    }

    /// Where the page is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A read-only descriptor of the page, to be passed to a process that writes to the volume.
    ///
    /// # Errors
    /// [`GateError::Io`].
    pub fn reader_fd(&self) -> Result<OwnedFd, GateError> {
        // By descriptor, so that it is this page even if the path was replaced meanwhile.
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
