//! What can go wrong with the gate page itself.

use std::path::PathBuf;

use bascule_types::{Generation, Owner, VolumeId};

/// A gate page that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// A system call on the page failed.
    #[error("cannot {action} the gate page {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The page; empty when only its descriptor is known.
        path: PathBuf,
        /// Why it failed.
        source: rustix::io::Errno,
    },
    /// Another process is this page's writer.
    #[error("the gate page {path} is held by another bascule-volume process")]
    Busy {
        /// The page.
        path: PathBuf,
    },
    /// The file is shorter than a page, or its creator has not finished it.
    #[error("the gate page is not ready")]
    NotReady,
    /// The file is something else.
    #[error("this file is not a gate page")]
    BadMagic,
    /// The page is of a release that this one does not understand.
    #[error("the gate page needs a reader of version {needed}; this is version {known}")]
    TooNew {
        /// The lowest version that may read it.
        needed: u64,
        /// This release's version.
        known: u64,
    },
    /// The page was written before the host's last boot, so its times mean nothing.
    #[error("the gate page is of an earlier boot")]
    EarlierBoot,
    /// The page belongs to another volume.
    #[error("the gate page is for {found}, not {wanted}")]
    OtherVolume {
        /// The volume in the page.
        found: VolumeId,
        /// The volume wanted.
        wanted: VolumeId,
    },
    /// A publication would let an older owner through again.
    #[error("the gate page shows {shown}; it cannot go on to {asked}")]
    NotNewer {
        /// In the page.
        shown: Owner,
        /// Asked for.
        asked: Owner,
    },
    /// The generation does not fit the page's 48 bits.
    #[error("generation {generation} does not fit the gate page")]
    GenerationTooLarge {
        /// The generation.
        generation: Generation,
    },
}
