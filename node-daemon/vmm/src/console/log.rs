//! The console log: a file whose end is the guest's last output, whenever this process is killed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write as _};

use super::{HISTORY_BYTES, count};

/// The file is shortened to the ring's bytes when it has this length: it lies in memory (tmpfs), and a guest must not
/// fill that. At least twice the ring, so that the bytes that are moved are not overwritten on the way.
const LOG_BYTES_MAX: u64 = 1 << 20;
const _: () = assert!(LOG_BYTES_MAX >= 2 * HISTORY_BYTES as u64);

/// A log file, which this process alone writes.
#[derive(Debug)]
pub(super) struct Log {
    file: File,
    /// The file's length in bytes, and the offset of the next write.
    length: u64,
}

impl Log {
    /// Continues `file`.
    pub(super) fn new(mut file: File) -> io::Result<Self> {
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, length })
    }

    /// Appends `bytes`, which are the last ones of `ring` already.
    ///
    /// # Guarantees
    /// At each moment the last bytes of the file are the last output: the ring is first written over the file's begin, and
    /// the file is shortened after that.
    pub(super) fn append(&mut self, bytes: &[u8], ring: &VecDeque<u8>) -> io::Result<()> {
        if self.length < LOG_BYTES_MAX {
            self.file.write_all(bytes)?;
            self.length = self.length.saturating_add(count(bytes));
            return Ok(());
        }
        self.file.rewind()?;
        let (first, second) = ring.as_slices();
        self.file.write_all(first)?;
        self.file.write_all(second)?;
        self.length = count(first) + count(second);
        self.file.set_len(self.length)
    }
}
