//! The panics of a guest's kernel.

use serde::{Deserialize, Serialize};

/// The panics that the guest's kernel has told of, through its pvpanic device. Also a part of the saved state of a
/// machine. Whoever may write to I/O ports in the guest chooses all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PanicStatus {
    /// Panics since the guest was started, also on the nodes from which it has come.
    pub count: u32,
    /// The one that the guest is in; none before the first, and again once its machine was reset.
    pub present: Option<Panic>,
}

/// A panic of a guest's kernel, as QEMU's specification of the pvpanic device tells two apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Panic {
    /// The kernel goes no further: the host is to act.
    Panicked,
    /// A crash kernel (kdump) goes on, and resets the machine when it has saved the memory: the host is not to act.
    CrashLoaded,
}

impl PanicStatus {
    /// Whether there was none.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.count == 0 && self.present.is_none()
    }
}
