//! Units as types. Conversions that can fail are checked and carry the unit in their name.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A count of bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// A count of 512-byte sectors, the unit of virtio-blk (virtio 1.2, 5.2.4).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Sectors(pub u64);

/// A position on a volume, in 4096-byte blocks from its start.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Lba(pub u64);

/// A moment on one host's `CLOCK_BOOTTIME`, in nanoseconds since its boot. The clock counts through
/// suspend and cannot be set. Never compare it with another host's.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct BootTime(pub u64);

/// Why a conversion between units failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum UnitError {
    /// The byte count is not a multiple of the unit.
    #[error("{bytes} bytes are not a whole number of {unit}-byte units")]
    NotAligned {
        bytes: u64,
        /// The unit's size in bytes.
        unit: u64,
    },
    /// The result does not fit 64 bits.
    #[error("a value overflows 64 bits")]
    Overflow,
}

impl Bytes {
    /// `n` MiB.
    #[must_use]
    pub const fn mib(n: u32) -> Self {
        Self((n as u64) << 20)
    }

    /// `n` GiB.
    #[must_use]
    pub const fn gib(n: u32) -> Self {
        Self((n as u64) << 30)
    }

    /// This many bytes as whole 512-byte sectors.
    ///
    /// # Errors
    /// [`UnitError::NotAligned`] for a remainder.
    pub const fn bytes_to_sectors(self) -> Result<Sectors, UnitError> {
        if self.0.is_multiple_of(SECTOR_BYTES) {
            Ok(Sectors(self.0 / SECTOR_BYTES))
        } else {
            Err(UnitError::NotAligned {
                bytes: self.0,
                unit: SECTOR_BYTES,
            })
        }
    }
}

impl Sectors {
    /// This many sectors in bytes.
    ///
    /// # Errors
    /// [`UnitError::Overflow`].
    pub const fn sectors_to_bytes(self) -> Result<Bytes, UnitError> {
        match self.0.checked_mul(SECTOR_BYTES) {
            Some(bytes) => Ok(Bytes(bytes)),
            None => Err(UnitError::Overflow),
        }
    }
}

impl Lba {
    /// The byte offset of this block on its volume.
    ///
    /// # Errors
    /// [`UnitError::Overflow`].
    pub const fn lba_to_bytes(self) -> Result<Bytes, UnitError> {
        match self.0.checked_mul(LBA_BYTES) {
            Some(bytes) => Ok(Bytes(bytes)),
            None => Err(UnitError::Overflow),
        }
    }
}

impl BootTime {
    /// The moment `duration` later; saturates.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// The time from `earlier` to this moment; zero if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B", self.0)
    }
}

/// The size of a virtio-blk sector, in bytes.
const SECTOR_BYTES: u64 = 512;
/// The size of a volume block, in bytes.
const LBA_BYTES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_with_a_remainder_are_not_converted_to_sectors() {
        assert_eq!(Bytes(1024).bytes_to_sectors(), Ok(Sectors(2)));
        assert_eq!(
            Bytes(1023).bytes_to_sectors(),
            Err(UnitError::NotAligned {
                bytes: 1023,
                unit: 512
            })
        );
    }

    #[test]
    fn an_offset_beyond_64_bits_is_refused() {
        assert_eq!(Lba(u64::MAX).lba_to_bytes(), Err(UnitError::Overflow));
        assert_eq!(Sectors(3).sectors_to_bytes(), Ok(Bytes(1536)));
    }

    #[test]
    fn boot_time_saturates_instead_of_wrapping() {
        let now = BootTime(10);
        assert_eq!(now.after(Duration::MAX), BootTime(u64::MAX));
        assert_eq!(now.since(BootTime(20)), Duration::ZERO);
    }
}
