//! `vm.log`: it lies in memory (tmpfs), lives as long as its guest, and some of its lines come whenever the guest wants.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};

/// The log is shortened to [`KEPT_BYTES`] before it becomes longer than this.
const BYTES_MAX: u64 = 1 << 20;
/// What is kept of it: the newest lines.
const KEPT_BYTES: u64 = 256 << 10;

/// The end of a log, in a file that is open for reading and appending.
///
/// # Assumes
/// Others append to the file too (standard error, the report of a refused system call), a few lines each.
#[derive(Debug)]
pub(super) struct BoundedLog {
    file: File,
    /// The file's length in bytes, as far as this writer knows.
    length: u64,
}

impl BoundedLog {
    /// Continues `file`.
    ///
    /// # Errors
    /// When its length cannot be read.
    pub(super) fn new(mut file: File) -> io::Result<Self> {
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, length })
    }

    /// Drops all but the newest lines. What was read is lost if the process is killed before it has written it again.
    fn shorten(&mut self) -> io::Result<()> {
        let length = self.file.seek(SeekFrom::End(0))?;
        let start = length.saturating_sub(KEPT_BYTES);
        self.file.seek(SeekFrom::Start(start))?;
        let mut kept = Vec::new();
        (&self.file).take(KEPT_BYTES).read_to_end(&mut kept)?;
        // The first of them is probably cut.
        let line = kept.iter().position(|&byte| byte == b'\n');
        let kept = kept
            .get(line.map_or(0, |end| end + 1)..)
            .unwrap_or_default();
        self.file.set_len(0)?;
        self.file.write_all(kept)?;
        self.length = u64::try_from(kept.len()).unwrap_or(u64::MAX);
        Ok(())
    }
}

impl Write for BoundedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let added = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.length.saturating_add(added) > BYTES_MAX {
            self.shorten()?;
        }
        let written = self.file.write(bytes)?;
        let added = u64::try_from(written).unwrap_or(u64::MAX);
        self.length = self.length.saturating_add(added);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    fn appending(path: &std::path::Path) -> File {
        let mut options = OpenOptions::new();
        let options = options.create(true).read(true).append(true);
        options.open(path).unwrap()
    }

    /// A guest could have filled the node's memory with lines about what it does.
    #[test]
    fn a_log_without_end_has_a_bounded_length_and_the_newest_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.log");
        let mut other = appending(&path);
        let mut log = BoundedLog::new(appending(&path)).unwrap();
        let mut length_max = 0;
        for number in 0..200_000 {
            writeln!(log, "line {number} of a guest that wants to be heard").unwrap();
            if number % 1000 == 999 {
                writeln!(other, "another's line behind {number}").unwrap();
                length_max = length_max.max(std::fs::metadata(&path).unwrap().len());
            }
        }
        // Others' lines since it was last shortened come on top.
        assert!(length_max < BYTES_MAX + (16 << 10), "{length_max}");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() > 4000, "{}", lines.len());
        assert_eq!(lines[lines.len() - 1], "another's line behind 199999");
        let numbers = lines.iter().filter_map(|line| line.strip_prefix("line "));
        let numbers: Vec<u32> = numbers
            .map(|rest| rest.split(' ').next().unwrap().parse().unwrap())
            .collect();
        let last = u32::try_from(numbers.len()).unwrap();
        let expected: Vec<u32> = (200_000 - last..200_000).collect();
        assert_eq!(numbers, expected, "no line of the end is lost or cut");
    }

    #[test]
    fn a_log_that_is_there_is_continued() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.log");
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        let mut log = BoundedLog::new(appending(&path)).unwrap();
        log.write_all(b"\nlast\n").unwrap();
        let text = std::fs::read(&path).unwrap();
        assert!(text.ends_with(b"x\nlast\n") && text.len() < 300 << 10);
    }
}
