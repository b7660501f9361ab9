//! Reading and writing little-endian fields. A short body is an error, never a panic.

use super::error::WireError;
use super::kind::FrameKind;

/// Takes fields off the front of one frame's body.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    kind: FrameKind,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) const fn new(kind: FrameKind, body: &'a [u8]) -> Self {
        Self { kind, rest: body }
    }

    pub(super) const fn malformed(&self, what: &'static str) -> WireError {
        WireError::Malformed {
            kind: self.kind,
            what,
        }
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or_else(|| self.malformed("too short"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or_else(|| self.malformed("too short"))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn id(&mut self) -> Result<[u8; 16], WireError> {
        self.array()
    }

    pub(super) fn reserved(&mut self, count: usize) -> Result<(), WireError> {
        let bytes = self.bytes(count)?;
        if bytes.iter().any(|&byte| byte != 0) {
            return Err(self.malformed("reserved bytes are not zero"));
        }
        Ok(())
    }

    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.malformed("bytes left over"))
        }
    }
}

/// Appends fields to a body.
pub(super) trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_zeroes(&mut self, count: usize);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_zeroes(&mut self, count: usize) {
        self.resize(self.len() + count, 0);
    }
}
