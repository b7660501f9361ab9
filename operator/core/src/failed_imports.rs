//! What is kept of the attempts to import a disk that failed.

use crate::Moment;

/// The failed attempts to import one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedImports {
    /// How many there were; the number of the last one.
    pub count: u32,
    /// When the next attempt is made; none when the same source would fail again.
    pub next: Option<Moment>,
    /// Why the last one failed, for users.
    pub message: String,
}
