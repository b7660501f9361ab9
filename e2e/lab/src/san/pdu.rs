//! iSCSI protocol data units: a basic header segment of 48 bytes, then data padded to four (RFC 7143 §11).

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

/// A protocol data unit without digests; additional header segments are skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pdu {
    pub(super) header: [u8; HEADER_BYTES],
    pub(super) data: Vec<u8>,
}

impl Pdu {
    pub(super) fn new(opcode: u8, flags: u8) -> Self {
        let mut header = [0; HEADER_BYTES];
        header[0] = opcode;
        header[1] = flags;
        Self {
            header,
            data: Vec::new(),
        }
    }

    /// Answer to `request`: with its task tag.
    pub(super) fn answer(request: &Self, opcode: u8, flags: u8) -> Self {
        let mut answer = Self::new(opcode, flags);
        answer.header[16..20].copy_from_slice(&request.header[16..20]);
        answer
    }

    pub(super) fn with_data(mut self, data: Vec<u8>) -> Self {
        self.data = data;
        self
    }

    pub(super) fn opcode(&self) -> u8 {
        self.header[0] & 0x3f
    }

    pub(super) fn immediate(&self) -> bool {
        self.header[0] & 0x40 != 0
    }

    pub(super) fn flags(&self) -> u8 {
        self.header[1]
    }

    pub(super) fn word(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.header[at..at + 4]);
        u32::from_be_bytes(bytes)
    }

    pub(super) fn set_word(&mut self, at: usize, word: u32) {
        self.header[at..at + 4].copy_from_slice(&word.to_be_bytes());
    }

    /// `None` at the end of the stream.
    pub(super) fn read(stream: &mut impl Read) -> Result<Option<Self>> {
        let mut header = [0; HEADER_BYTES];
        if stream.read(&mut header[..1]).context("read a header")? == 0 {
            return Ok(None);
        }
        stream
            .read_exact(&mut header[1..])
            .context("read a header")?;
        let length = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        ensure!(length <= DATA_BYTES_MAX, "a data segment of {length} bytes");
        let mut data = vec![0; usize::from(header[4]) * 4 + length.next_multiple_of(4)];
        stream.read_exact(&mut data).context("read a segment")?;
        data.drain(..usize::from(header[4]) * 4);
        data.truncate(length);
        Ok(Some(Self { header, data }))
    }

    pub(super) fn write(&self, stream: &mut impl Write) -> Result<()> {
        let mut bytes = self.header.to_vec();
        let length = u32::try_from(self.data.len()).context("data segment")?;
        bytes[5..8].copy_from_slice(&length.to_be_bytes()[1..]);
        bytes.extend(&self.data);
        bytes.resize(HEADER_BYTES + self.data.len().next_multiple_of(4), 0);
        stream.write_all(&bytes).context("send")
    }
}

/// Keys and values of a login (§6.1): `key=value`, each with a zero byte behind it.
pub(super) fn keys(data: &[u8]) -> Vec<(String, String)> {
    let text = String::from_utf8_lossy(data).into_owned();
    let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
    pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// The reverse of [`keys`].
pub(super) fn text(keys: &[(&str, String)]) -> Vec<u8> {
    let pairs = keys.iter().map(|(key, value)| format!("{key}={value}\0"));
    pairs.collect::<String>().into_bytes()
}

const HEADER_BYTES: usize = 48;
/// What the target declares as its MaxRecvDataSegmentLength.
pub(super) const DATA_BYTES_MAX: usize = 256 << 10;

/// Operation codes of initiators (§11.2.1.2).
pub(super) mod request {
    pub(in super::super) const NOP_OUT: u8 = 0x00;
    pub(in super::super) const COMMAND: u8 = 0x01;
    pub(in super::super) const TASK_MANAGEMENT: u8 = 0x02;
    pub(in super::super) const LOGIN: u8 = 0x03;
    pub(in super::super) const DATA_OUT: u8 = 0x05;
    pub(in super::super) const LOGOUT: u8 = 0x06;
}

/// Operation codes of targets.
pub(super) mod response {
    pub(in super::super) const NOP_IN: u8 = 0x20;
    pub(in super::super) const COMMAND: u8 = 0x21;
    pub(in super::super) const TASK_MANAGEMENT: u8 = 0x22;
    pub(in super::super) const LOGIN: u8 = 0x23;
    pub(in super::super) const DATA_IN: u8 = 0x25;
    pub(in super::super) const LOGOUT: u8 = 0x26;
    pub(in super::super) const REJECT: u8 = 0x3f;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_survives_the_wire_with_its_data_padded() {
        let mut sent = Pdu::new(request::LOGIN, 0x87).with_data(b"a=b\0c=d\0x".to_vec());
        sent.set_word(16, 0x0102_0304);
        let mut wire = Vec::new();
        sent.write(&mut wire).unwrap();
        assert_eq!(wire.len(), 48 + 12);
        let got = Pdu::read(&mut wire.as_slice()).unwrap().unwrap();
        assert_eq!((got.word(16), &got.data), (0x0102_0304, &sent.data));
        let pairs = keys(&got.data);
        assert_eq!(pairs[1], ("c".to_owned(), "d".to_owned()));
        assert!(Pdu::read(&mut [].as_slice()).unwrap().is_none());
        assert!(Pdu::read(&mut [1_u8].as_slice()).is_err());
    }
}
