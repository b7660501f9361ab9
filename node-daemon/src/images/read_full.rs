//! Reading whole chunks from a source that comes in drops.

use std::io::{self, Read};

/// Reads until the buffer is full or the source ends.
pub(super) fn read_full(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) {
        match source.read(room) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_comes_in_drops_fills_whole_chunks() {
        struct Drops(u8);
        impl Read for Drops {
            fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
                self.0 = self.0.saturating_sub(1);
                let count = usize::from(self.0 > 0);
                room[..count].fill(self.0);
                Ok(count)
            }
        }
        let mut buffer = [0; 3];
        assert_eq!(read_full(&mut Drops(5), &mut buffer).unwrap(), 3);
        assert_eq!(buffer, [4, 3, 2]);
        assert_eq!(read_full(&mut Drops(2), &mut buffer).unwrap(), 1);
    }
}
