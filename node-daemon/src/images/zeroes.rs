//! Zeroes, which are not written as data.

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Each byte is its successor, and the first is zero: one comparison of memory.
    let (begin, end) = (bytes.len().checked_sub(1), 1..);
    match begin {
        None => true,
        Some(last) => bytes.first() == Some(&0) && bytes.get(..last) == bytes.get(end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_no_zero() {
        for length in [1, 2, 3, 64, 1000] {
            assert!(is_zero(&vec![0; length]));
            for at in 0..length {
                let mut bytes = vec![0; length];
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {length}");
            }
        }
        assert!(is_zero(&[]));
        assert!(!is_zero(&[1; 4096]));
    }
}
