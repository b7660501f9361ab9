//! How long an image may be.

use anyhow::Result;
use bascule_image::{Packing, Role, packing};
use bascule_types::{Bytes, DiskRole};
use serde::{Deserialize, Serialize};

/// What decides how long an image may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LengthLimit {
    /// What the image is for.
    pub(crate) role: DiskRole,
    /// The length of the disk that it goes to.
    pub(crate) disk: Bytes,
}

impl LengthLimit {
    /// Refuses an unpacked image of `found` bytes, or of at least that many, if it is too long.
    pub(crate) fn check(self, found: u64) -> Result<()> {
        Ok(image_role(self.role).check_length(found, self.disk.0)?)
    }

    /// Refuses a packed image of `found` bytes, or of at least that many, if it is too long.
    pub(crate) fn check_packed(self, found: u64) -> Result<()> {
        Ok(image_role(self.role).check_download(found, self.disk.0)?)
    }

    /// Refuses an image that its server announces as too long: `header` is its beginning.
    pub(crate) fn check_announced(self, found: u64, header: &[u8]) -> Result<()> {
        if packing(header) == Packing::Raw {
            self.check(found)
        } else {
            self.check_packed(found)
        }
    }
}

pub(crate) const fn image_role(role: DiskRole) -> Role {
    match role {
        DiskRole::Data => Role::Disk,
        DiskRole::Kernel => Role::Kernel,
        DiskRole::Initrd => Role::Initrd,
    }
}
