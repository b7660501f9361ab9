//! Ownership: who may write a virtual machine's disks.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl $name {
            /// The value one higher.
            ///
            /// # Panics
            /// When the counter would wrap: it then no longer orders anything, and going on would
            /// be unsafe.
            #[must_use]
            pub const fn next(self) -> Self {
                match self.0.checked_add(1) {
                    Some(value) => Self(value),
                    None => panic!(concat!(stringify!($name), " wrapped")),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

counter!(
    /// The index of a node's heartbeat slot on a volume, from 0.
    SlotId(u16)
);
counter!(
    /// One life of a slot's holder. Rises with every node boot and whenever a lease has lapsed.
    /// 0 means that nobody ever held the slot.
    Generation(u64)
);
counter!(
    /// The number of an ownership of a virtual machine. The coordinator raises it on the volume before a
    /// new owner may write.
    Epoch(u64)
);

/// Who may write: a slot in one of its generations. `(3, 7)` never again becomes an owner once
/// slot 3 is in generation 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// The slot.
    pub slot: SlotId,
    /// Its generation at the time.
    pub generation: Generation,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} generation {}", self.slot, self.generation)
    }
}

/// The right to write a virtual machine's disks: its owner and the epoch of this ownership. At most
/// one [`Ownership`] of a virtual machine is current; a later one always has a higher epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ownership {
    /// The slot and generation that may write.
    pub owner: Owner,
    /// The epoch that began with this ownership.
    pub epoch: Epoch,
}

impl Ownership {
    /// The ownership of `owner` in `epoch`.
    #[must_use]
    pub const fn new(owner: Owner, epoch: Epoch) -> Self {
        Self { owner, epoch }
    }
}

impl fmt::Display for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in epoch {}", self.owner, self.epoch)
    }
}
