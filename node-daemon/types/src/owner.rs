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
    /// One tenure over a virtual machine's disks. Rises on the volume before a new owner writes.
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
