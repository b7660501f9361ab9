//! The reader's side: the check that every write passes.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bascule_types::{BootTime, Generation, Owner, SlotId, VolumeId};
use rustix::fs::{Mode, OFlags, fstat};

use crate::error::GateError;
use crate::layout::{
    BOOT_ID, EXPIRY, FAILED, LAYOUT_VERSION, MAGIC, MAGIC_VALUE, OWNER, PAGE_BYTES, SEQUENCE_SENT,
    VERSION_READER_MIN, VOLUME,
};
use crate::page::Page;

/// A gate page, mapped read-only. Cheap to check: four loads, no system call.
#[derive(Debug)]
pub struct GateReader {
    page: Page,
    volume: VolumeId,
}

/// What a gate page shows at one moment: for logs, status and the watchdog's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateView {
    /// Who holds the lease; none before the first join.
    pub owner: Option<Owner>,
    /// When that lease ends; `BootTime(0)` is closed.
    pub expiry: BootTime,
    /// Whether the volume is sticky-failed on this node.
    pub failed: bool,
    /// The highest heartbeat sequence number that was ever submitted.
    pub sequence_sent: u64,
}

impl GateView {
    /// Whether some lease of this node is valid at `now`, whoever holds it.
    #[must_use]
    pub fn lease_is_valid(&self, now: BootTime) -> bool {
        self.owner.is_some() && now < self.expiry
    }
}

/// A write may not be submitted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the I/O gate is closed: {reason}")]
pub struct GateClosed {
    /// Why.
    pub reason: GateClosedReason,
}

/// Why a gate is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateClosedReason {
    /// The lease ended, or the gate was closed deliberately (`expiry` is then `BootTime(0)`).
    /// It opens again if the lease is renewed.
    Expired {
        /// When it ended.
        expiry: BootTime,
    },
    /// The slot is in another generation. Ask for the row again: it may have been kept.
    OtherOwner {
        /// Who the page shows; nobody before the first join.
        shown: Option<Owner>,
    },
    /// A metadata write or flush failed: closed until the volume is re-opened and re-verified.
    StickyFailed,
}

impl fmt::Display for GateClosedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired { expiry } => write!(f, "the lease ended at boot time {} ns", expiry.0),
            Self::OtherOwner { shown: Some(shown) } => write!(f, "the lease is {shown}'s"),
            Self::OtherOwner { shown: None } => f.write_str("nobody holds the lease"),
            Self::StickyFailed => f.write_str("the volume is sticky-failed on this node"),
        }
    }
}

impl GateReader {
    /// Map the gate page at `path`.
    ///
    /// # Errors
    /// [`GateError`] when it is missing, not ready, of an earlier boot or of a newer release.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GateError> {
        let path = path.as_ref();
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| io_error("open", path, source))?;
        Self::map(&file, path)
    }

    /// Map the gate page behind a descriptor that came over a socket. The descriptor is closed.
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

    /// The volume that this gate guards.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Whether `owner` may submit a write at `now`.
    ///
    /// # Guarantees
    /// `Ok` means that at some moment during this call `owner` held a lease that ends after `now`.
    /// Take `now` before the call, and submit right after it: what happens to a process that is
    /// frozen in between is the watchdog's business.
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

    /// What the page shows, consistent as [`GateReader::check`] is: when the tenure changes
    /// meanwhile, the lease shows as ended.
    #[must_use]
    pub fn view(&self) -> GateView {
        view(&self.page)
    }
}

/// What `page` shows.
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

/// Whether `page` is one that this release understands, of this boot.
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
    if page.load_16(BOOT_ID) == boot_id()? {
        Ok(())
    } else {
        Err(GateError::EarlierBoot)
    }
}

/// The kernel's identity of this boot.
pub(crate) fn boot_id() -> Result<[u8; 16], GateError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(|error| {
        let source = rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO);
        io_error("read the boot id for", path, source)
    })?;
    // An identity like any other; the type is borrowed for its parser.
    text.trim()
        .parse::<VolumeId>()
        .map(VolumeId::to_bytes)
        .map_err(|_| io_error("parse the boot id for", path, rustix::io::Errno::INVAL))
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

/// The owner in a word; generation 0 is nobody.
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

/// Low bits of a tenure word that hold the slot.
const OWNER_SLOT_BITS: u32 = 16;
/// Bits that are left for the generation.
const OWNER_GENERATION_BITS: u32 = 48;
