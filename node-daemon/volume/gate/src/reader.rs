//! The reader's side of the gate page: the check before every write.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bascule_types::{BootId, BootTime, Generation, Owner, SlotId, VolumeId};
use rustix::fs::{Mode, OFlags, fstat};

use crate::clock::boot_id;
use crate::error::GateError;
use crate::layout::{
    BOOT_ID, EXPIRY, FAILED, LAYOUT_VERSION, MAGIC, MAGIC_VALUE, OWNER, PAGE_BYTES, SEQUENCE_SENT,
    VERSION_READER_MIN, VOLUME,
};
use crate::page::Page;

/// A gate page, mapped read-only. A check takes four loads and no system call.
#[derive(Debug)]
pub struct GateReader {
    page: Page,
    volume: VolumeId,
}

/// The contents of a gate page at one moment: for logs, status and `bascule-watchdog`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateView {
    /// The slot and generation that hold the lease; none before the node's first join.
    pub owner: Option<Owner>,
    /// The end of the lease; `BootTime(0)` means that the gate is closed.
    pub expiry: BootTime,
    /// Whether the volume is sticky-failed on this node.
    pub failed: bool,
    /// The highest heartbeat sequence number ever submitted.
    pub sequence_sent: u64,
}

impl GateView {
    /// Whether this node's lease is valid at `now`, whichever its generation.
    #[must_use]
    pub fn lease_is_valid(&self, now: BootTime) -> bool {
        self.owner.is_some() && now < self.expiry
    }
}

/// The refusal of a write: it must not be submitted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the I/O gate is closed: {reason}")]
pub struct GateClosed {
    /// The first of the failed checks.
    pub reason: GateClosedReason,
}

/// Why a gate is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateClosedReason {
    /// The lease ended, or the gate was closed on purpose (`expiry` is then `BootTime(0)`). A renewal
    /// opens the gate again.
    Expired {
        /// The end of the lease.
        expiry: BootTime,
    },
    /// The slot is in another generation. Read the VM's row again: its ownership may have gone over
    /// to the new generation.
    OtherOwner {
        /// The owner in the page; none before the first join.
        shown: Option<Owner>,
    },
    /// A metadata write or flush failed: closed until the volume is re-opened and re-verified.
    StickyFailed,
}

impl fmt::Display for GateClosedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired { expiry } => write!(f, "the lease ended at boot time {} ns", expiry.0),
            Self::OtherOwner { shown: Some(shown) } => write!(f, "the lease is held by {shown}"),
            Self::OtherOwner { shown: None } => f.write_str("this node has no lease yet"),
            Self::StickyFailed => f.write_str("the volume is sticky-failed on this node"),
        }
    }
}

impl GateReader {
    /// Maps the gate page at `path`.
    ///
    /// # Errors
    /// [`GateError`] when it is missing, not ready, of an earlier boot or of a newer release.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GateError> {
        let path = path.as_ref();
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| io_error("open", path, source))?;
        Self::map(&file, path)
    }

    /// Maps the gate page of a descriptor that was received over a socket, and closes the descriptor.
    ///
    /// # Errors
    /// As for [`GateReader::open`].
    #[expect(
        clippy::needless_pass_by_value,
        reason = "ownership says that it is closed"
    )]
    pub fn from_fd(file: OwnedFd) -> Result<Self, GateError> {
        Self::map(&file, Path::new(""))
    }

    fn map(file: &OwnedFd, path: &Path) -> Result<Self, GateError> {
        let status = fstat(file).map_err(|source| io_error("examine", path, source))?;
        if usize::try_from(status.st_size).unwrap_or(0) < PAGE_BYTES {
            return Err(GateError::NotReady);
        }
        let page = Page::map(file, false).map_err(|source| io_error("map", path, source))?;
        verify(&page)?;
        let volume = VolumeId::from_bytes(page.load_16(VOLUME));
        Ok(Self { page, volume })
    }

    /// The volume whose writes this gate guards.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Whether `owner` may submit a write at `now`.
    ///
    /// # Guarantees
    /// `Ok` means that at some moment during this call `owner` held a lease that ends after `now`.
    /// Take `now` before the call and submit right after it. If the process is frozen in between,
    /// only the watchdog keeps the write from landing late.
    ///
    /// # Errors
    /// [`GateClosed`] with the reason.
    pub fn check(&self, now: BootTime, owner: Owner) -> Result<(), GateClosed> {
        let before = self.page.load(OWNER);
        let expiry = BootTime(self.page.load(EXPIRY));
        let after = self.page.load(OWNER);
        let failed = self.page.load(FAILED) != 0;
        let mine = word_from_owner(owner).ok();
        let reason = if failed {
            GateClosedReason::StickyFailed
        } else if mine != Some(before) || before != after {
            GateClosedReason::OtherOwner {
                shown: owner_from_word(after),
            }
        } else if now >= expiry {
            GateClosedReason::Expired { expiry }
        } else {
            return Ok(());
        };
        Err(GateClosed { reason })
    }

    /// The page's contents, consistent as in [`GateReader::check`]: if the generation changes during
    /// the call, the lease shows as ended.
    #[must_use]
    pub fn view(&self) -> GateView {
        view(&self.page)
    }
}

/// The contents of `page`.
pub(crate) fn view(page: &Page) -> GateView {
    let before = page.load(OWNER);
    let expiry = page.load(EXPIRY);
    let after = page.load(OWNER);
    GateView {
        owner: owner_from_word(after),
        expiry: BootTime(if before == after { expiry } else { 0 }),
        failed: page.load(FAILED) != 0,
        sequence_sent: page.load(SEQUENCE_SENT),
    }
}

/// Checks that this release can read `page` and that it was created in this boot.
pub(crate) fn verify(page: &Page) -> Result<(), GateError> {
    match page.load(MAGIC) {
        MAGIC_VALUE => {}
        0 => return Err(GateError::NotReady),
        _ => return Err(GateError::BadMagic),
    }
    let needed = page.load(VERSION_READER_MIN);
    if needed > LAYOUT_VERSION {
        return Err(GateError::TooNew {
            needed,
            known: LAYOUT_VERSION,
        });
    }
    if page.load_16(BOOT_ID) == page_boot_id()? {
        Ok(())
    } else {
        Err(GateError::EarlierBoot)
    }
}

/// This boot's id as the page stores it.
pub(crate) fn page_boot_id() -> Result<[u8; 16], GateError> {
    boot_id().map(BootId::to_bytes).map_err(|error| {
        let source = rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::INVAL);
        io_error("read the boot id for", Path::new(""), source)
    })
}

/// An owner as one word: generation << 16 | slot.
pub(crate) fn word_from_owner(owner: Owner) -> Result<u64, GateError> {
    if owner.generation.0 >> OWNER_GENERATION_BITS == 0 {
        Ok(owner.generation.0 << OWNER_SLOT_BITS | u64::from(owner.slot.0))
    } else {
        Err(GateError::GenerationTooLarge {
            generation: owner.generation,
        })
    }
}

/// The owner in a word; none for generation 0.
pub(crate) fn owner_from_word(word: u64) -> Option<Owner> {
    let slot = u16::try_from(word & u64::from(u16::MAX)).ok()?;
    let generation = Generation(word >> OWNER_SLOT_BITS);
    (generation != Generation(0)).then_some(Owner {
        slot: SlotId(slot),
        generation,
    })
}

/// An I/O error on the page.
pub(crate) fn io_error(action: &'static str, path: &Path, source: rustix::io::Errno) -> GateError {
    GateError::Io {
        action,
        path: PathBuf::from(path),
        source,
    }
}

/// Low bits of an owner word, which hold the slot.
const OWNER_SLOT_BITS: u32 = 16;
/// High bits of an owner word, which hold the generation.
const OWNER_GENERATION_BITS: u32 = 48;
