//! What a machine boots.

use std::io::Read;

/// Opens what a machine boots, from its begin: at the machine's start, and again at each of its resets.
pub type OpenImages = Box<dyn Fn() -> Result<BootSource, ImagesError> + Send + Sync>;

/// Why the images cannot be opened; the text names the field.
pub type ImagesError = Box<dyn std::error::Error + Send + Sync>;

/// What a machine boots.
pub struct BootSource {
    /// The kernel: bzImage, or ELF with a PVH note.
    pub kernel: Vec<u8>,
    /// The initial RAM disk.
    pub initrd: Option<Initrd>,
    /// The kernel command line.
    pub cmdline: String,
}

/// An initial RAM disk, read straight into guest memory.
#[expect(missing_docs, reason = "the field names say all")]
pub struct Initrd {
    /// Its length in bytes.
    pub length: u64,
    pub content: Box<dyn Read + Send>,
}

impl std::fmt::Debug for BootSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BootSource")
            .field("kernel_bytes", &self.kernel.len())
            .field("initrd", &self.initrd)
            .field("cmdline", &self.cmdline)
            .finish()
    }
}

impl std::fmt::Debug for Initrd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Initrd")
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}
