//! A disk as it goes from the process that unpacks it to the writer: data and holes.
//!
//! Both ends are one program, started by itself, so there is no version. The writer trusts no number.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | little-endian: bit 63 is set for zeroes, the others are the piece's length in bytes |
//! | length | the data; nothing for zeroes |
//!
//! Data is [`CHUNK_BYTES`] long, and zeroes a multiple of it, but for the last piece of the disk.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, ensure};

use super::blocks::CHUNK_BYTES;
use super::read_full::read_full;

/// One piece of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// So many bytes in the caller's chunk.
    Data(usize),
    /// So many bytes that read as zeroes.
    Zeroes(u64),
}

pub(super) fn write_data(out: &mut impl Write, data: &[u8]) -> io::Result<()> {
    out.write_all(&(data.len() as u64).to_le_bytes())?;
    out.write_all(data)
}

pub(super) fn write_zeroes(out: &mut impl Write, length: u64) -> io::Result<()> {
    out.write_all(&(length | ZEROES).to_le_bytes())
}

/// The next piece, with its data in `chunk`; none at the end.
pub(super) fn read_piece(source: &mut impl Read, chunk: &mut [u8]) -> Result<Option<Piece>> {
    let mut header = [0; 8];
    let length = match read_full(source, &mut header).context("read the unpacked disk")? {
        0 => return Ok(None),
        8 => u64::from_le_bytes(header),
        _ => return cut_off(),
    };
    if length & ZEROES != 0 {
        return Ok(Some(Piece::Zeroes(length & !ZEROES)));
    }
    let wanted = usize::try_from(length).unwrap_or(usize::MAX);
    ensure!(
        wanted <= CHUNK_BYTES,
        "a piece of {wanted} bytes is too long"
    );
    let data = chunk.get_mut(..wanted).context("a chunk is too short")?;
    let found = read_full(source, data).context("read the unpacked disk")?;
    if found < wanted {
        return cut_off();
    }
    Ok(Some(Piece::Data(found)))
}

fn cut_off<T>() -> Result<T> {
    anyhow::bail!("the unpacked disk is cut off")
}

const ZEROES: u64 = 1 << 63;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_as_they_were_written() {
        let mut sent = Vec::new();
        write_data(&mut sent, b"data").unwrap();
        write_zeroes(&mut sent, 1 << 40).unwrap();
        assert_eq!(sent[..12], *b"\x04\0\0\0\0\0\0\0data");
        assert_eq!(sent[12..], [0, 0, 0, 0, 0, 1, 0, 0x80]);
        let (mut source, mut chunk) = (&sent[..], vec![0; CHUNK_BYTES]);
        let mut next = || read_piece(&mut source, &mut chunk).unwrap();
        assert_eq!(next(), Some(Piece::Data(4)));
        assert_eq!(next(), Some(Piece::Zeroes(1 << 40)));
        assert_eq!(next(), None);
        assert_eq!(chunk[..4], *b"data");
    }

    #[test]
    fn pieces_that_are_cut_off_or_too_long_are_errors() {
        let mut chunk = vec![0; CHUNK_BYTES];
        let long = (CHUNK_BYTES as u64 + 1).to_le_bytes();
        for sent in [&b"\x04\0\0"[..], b"\x04\0\0\0\0\0\0\0dat", &long] {
            let error = read_piece(&mut &sent[..], &mut chunk).unwrap_err();
            assert!(!crate::images::is_final(&error), "{error}");
        }
    }
}
