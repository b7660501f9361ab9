//! Memory for direct I/O.

/// A buffer whose start is aligned, as `O_DIRECT` wants it. Its address does not change while it
/// lives.
#[derive(Debug)]
pub struct AlignedBuffer {
    /// Longer than `length`, so that an aligned start lies in it. Never resized.
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// `length` zero bytes whose address is a multiple of `align` bytes, a power of two.
    #[must_use]
    pub fn new(length: usize, align: usize) -> Self {
        let bytes = vec![0; length + align];
        let start = bytes.as_ptr().align_offset(align);
        Self {
            bytes,
            start,
            length,
        }
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether the length is 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes, from the aligned start.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    /// The bytes, from the aligned start.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aligned_buffer_starts_at_a_multiple_of_its_alignment() {
        for (length, align) in [(1, 512), (4096, 4096), (0, 512)] {
            let mut buffer = AlignedBuffer::new(length, align);
            assert_eq!(buffer.bytes().as_ptr().addr() % align, 0);
            assert_eq!(buffer.bytes_mut().len(), length);
            assert!(buffer.bytes().iter().all(|byte| *byte == 0));
        }
    }
}
