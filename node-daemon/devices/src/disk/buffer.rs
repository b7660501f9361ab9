//! Bounce buffers: host memory that is aligned as direct I/O wants it.

use super::ring::HostRun;

/// A zeroed buffer whose start is aligned.
#[derive(Debug)]
pub(super) struct AlignedBuffer {
    /// Longer than asked for, so that an aligned start lies in it. Never resized, so it stays put.
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    pub(super) fn new(length: usize, align: usize) -> Self {
        let bytes = vec![0; length + align];
        let start = bytes.as_ptr().align_offset(align);
        Self {
            bytes,
            start,
            length,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }

    /// A part of it as the kernel addresses it.
    pub(super) fn host_run(&mut self, offset: usize, length: usize) -> HostRun {
        let part = &mut self.bytes_mut()[offset..offset + length];
        HostRun {
            address: part.as_mut_ptr().expose_provenance(),
            length,
        }
    }
}
