//! Errors of the gate page itself; a closed gate is not an error but a [`crate::GateClosed`].

use std::path::PathBuf;

use bascule_types::{Generation, Owner, VolumeId};

/// Why a gate page cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// A system call on the page failed.
    #[error("cannot {action} the gate page {path}")]
    Io {
        /// The operation that failed.
        action: &'static str,
        /// The page's file; empty when only its descriptor is known.
        path: PathBuf,
        /// The error of the system call.
        source: rustix::io::Errno,
    },
    /// Another process holds the writer's lock.
    #[error("the gate page {path} is held by another bascule-volume process")]
    Busy {
        /// The page's file.
        path: PathBuf,
    },
    /// The file is shorter than a page, or its creator has not finished it.
    #[error("the gate page is not ready")]
    NotReady,
    /// The file does not start with `BSCLGATE`.
    #[error("this file is not a gate page")]
    BadMagic,
    /// A later release wrote the page, in a layout that this release cannot read.
    #[error("the gate page needs a reader of version {needed}; this is version {known}")]
    TooNew {
        /// The lowest layout version that may read the page.
        needed: u64,
        /// The layout version of this release.
        known: u64,
    },
    /// The page was created before the host's last boot: its times are of another clock.
    #[error("the gate page is of an earlier boot")]
    EarlierBoot,
    /// The page belongs to another volume.
    #[error("the gate page is for {found}, not {wanted}")]
    OtherVolume {
        /// The volume id in the page.
        found: VolumeId,
        /// The volume id of the caller.
        wanted: VolumeId,
    },
    /// Publishing this owner would open the gate for an older generation, or for another slot.
    #[error("the gate page shows {shown}; {requested} is not a later generation of that slot")]
    NotNewer {
        /// The owner in the page.
        shown: Owner,
        /// The owner that was to be published.
        requested: Owner,
    },
    /// The generation does not fit the page's 48 bits.
    #[error("generation {generation} does not fit the gate page")]
    GenerationTooLarge {
        /// The generation that was to be published.
        generation: Generation,
    },
}
