//! Ownership: which node may run a virtual machine and write its disks, and since when.

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
            /// This number plus one.
            ///
            /// # Panics
            /// When the counter would wrap: old values would then order after new ones.
            #[must_use]
            pub const fn next(self) -> Self {
                match self.0.checked_add(1) {
                    Some(value) => Self(value),
                    None => panic!(concat!(stringify!($name), " wrapped")),
                }
            }

            /// Whether this is the number after `before`, which may be any that a peer sends.
            #[must_use]
            pub const fn follows(self, before: Self) -> bool {
                matches!(before.0.checked_add(1), Some(value) if value == self.0)
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
    /// The index of a node's heartbeat slot on a volume, 0 to 63.
    SlotId(u16)
);
counter!(
    /// A slot's incarnation. Rises with every boot of the node and whenever its lease has lapsed.
    /// 0: the slot is registered, and its node has not yet written a heartbeat.
    Generation(u64)
);
counter!(
    /// A virtual machine's fencing token: the number of the present ownership. The coordinator raises
    /// it on the volume before a new owner may write.
    Epoch(u64)
);

/// A slot in one of its generations: a node as the owner of virtual machines and imports. Once slot
/// 3 is in generation 8, `(3, 7)` never becomes an owner again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Owner {
    pub slot: SlotId,
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
#[expect(missing_docs, reason = "the field names say all")]
pub struct Ownership {
    pub owner: Owner,
    pub epoch: Epoch,
}

impl Ownership {
    /// An ownership by `owner` in `epoch`.
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
