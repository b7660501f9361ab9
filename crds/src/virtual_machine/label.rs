//! Names that are DNS labels.

/// RFC 1123 label.
pub(super) fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}
