//! The SCSI commands that Linux's disk driver sends (SPC-4, SBC-3), decided without I/O.

/// What a command asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Data that is known already.
    Answer(Vec<u8>),
    /// From this byte, this many bytes.
    Read { offset: u64, bytes: usize },
    /// As [`Self::Read`].
    Write { offset: u64, bytes: usize },
    /// CHECK CONDITION with this sense data.
    Refuse([u8; SENSE_BYTES]),
}

/// Decides on a command descriptor block, for logical unit `lun` of a disk of `disk_bytes`.
pub(super) fn decide(cdb: &[u8; 16], lun: u8, disk_bytes: u64) -> Action {
    let word = |at: usize| u32::from_be_bytes([cdb[at], cdb[at + 1], cdb[at + 2], cdb[at + 3]]);
    let short = |at: usize| u16::from_be_bytes([cdb[at], cdb[at + 1]]);
    let last = disk_bytes / BLOCK_BYTES - 1;
    let blocks = |lba: u64, count: u32| Range { lba, count, last };
    let long = || u64::from(word(2)) << 32 | u64::from(word(6));
    if lun != 0 && !matches!(cdb[0], 0x12 | 0xa0) {
        return Action::Refuse(sense(ILLEGAL_REQUEST, 0x25));
    }
    match cdb[0] {
        // TEST UNIT READY, START STOP UNIT, PREVENT ALLOW, SYNCHRONIZE CACHE: nothing is cached here.
        0x00 | 0x1b | 0x1e | 0x35 | 0x91 => Action::Answer(Vec::new()),
        // REQUEST SENSE
        0x03 => Action::Answer(sense(0, 0).to_vec()),
        0x12 if cdb[1] & 1 == 0 => Action::Answer(inquiry(lun)),
        0x12 => vital_product_data(cdb[2]),
        // MODE SENSE: no write cache, no protection.
        0x1a => Action::Answer(vec![3, 0, 0, 0]),
        0x5a => Action::Answer(vec![0, 6, 0, 0, 0, 0, 0, 0]),
        // READ CAPACITY
        0x25 => {
            let last = u32::try_from(last).unwrap_or(u32::MAX);
            Action::Answer([last.to_be_bytes(), BLOCK_WORD.to_be_bytes()].concat())
        }
        0x9e if cdb[1] & 0x1f == 0x10 => {
            let mut data = last.to_be_bytes().to_vec();
            data.extend(BLOCK_WORD.to_be_bytes());
            data.resize(32, 0);
            Action::Answer(data)
        }
        // REPORT LUNS: one, number 0.
        0xa0 => Action::Answer([&[0, 0, 0, 8][..], &[0; 12]].concat()),
        0x28 => blocks(u64::from(word(2)), u32::from(short(7))).read(),
        0x88 => blocks(long(), word(10)).read(),
        0x2a => blocks(u64::from(word(2)), u32::from(short(7))).write(),
        0x8a => blocks(long(), word(10)).write(),
        _ => Action::Refuse(sense(ILLEGAL_REQUEST, 0x20)),
    }
}

struct Range {
    lba: u64,
    count: u32,
    last: u64,
}

impl Range {
    fn bytes(&self) -> Option<(u64, usize)> {
        let end = self.lba.checked_add(u64::from(self.count))?;
        let inside = end <= self.last + 1 && self.count <= BLOCKS_MAX;
        let bytes = usize::try_from(u64::from(self.count) * BLOCK_BYTES).ok()?;
        inside.then_some((self.lba * BLOCK_BYTES, bytes))
    }

    fn read(&self) -> Action {
        let read = |(offset, bytes)| Action::Read { offset, bytes };
        self.bytes().map_or(OUT_OF_RANGE, read)
    }

    fn write(&self) -> Action {
        let write = |(offset, bytes)| Action::Write { offset, bytes };
        self.bytes().map_or(OUT_OF_RANGE, write)
    }
}

/// Standard INQUIRY data: a disk, SPC-4, or no such unit.
fn inquiry(lun: u8) -> Vec<u8> {
    let kind = if lun == 0 { 0 } else { 0x7f };
    let mut data = vec![kind, 0, 6, 2, 31, 0, 0, 2];
    data.extend(b"BASCULE lab san         1   ");
    data
}

fn vital_product_data(page: u8) -> Action {
    let payload = match page {
        0x00 => vec![0x00, 0x80, 0x83, 0xb0],
        0x80 => b"lab-san".to_vec(),
        // Device identification: one NAA identifier, the same over every portal.
        0x83 => vec![1, 3, 0, 8, 0x60, 0xba, 0x5c, 0, 0, 0, 0, 1],
        // Block limits: the longest transfer.
        0xb0 => {
            let mut limits = vec![0; 60];
            limits[4..8].copy_from_slice(&BLOCKS_MAX.to_be_bytes());
            limits
        }
        _ => return Action::Refuse(sense(ILLEGAL_REQUEST, 0x24)),
    };
    let length = u8::try_from(payload.len()).unwrap_or_default();
    Action::Answer([vec![0, page, 0, length], payload].concat())
}

/// Fixed-format sense data (SPC-4 §4.5.3).
const fn sense(key: u8, code: u8) -> [u8; SENSE_BYTES] {
    let mut data = [0; SENSE_BYTES];
    data[0] = 0x70;
    data[2] = key;
    data[7] = 10;
    data[12] = code;
    data
}

const OUT_OF_RANGE: Action = Action::Refuse(sense(ILLEGAL_REQUEST, 0x21));
const ILLEGAL_REQUEST: u8 = 5;
pub(super) const SENSE_BYTES: usize = 18;
const BLOCK_BYTES: u64 = 512;
const BLOCK_WORD: u32 = 512;
/// Longest transfer, in blocks: as much as comes with a write command itself (`DATA_BYTES_MAX`), so that none has to be asked for (R2T).
const BLOCKS_MAX: u32 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u64 = 1 << 30;

    fn cdb(bytes: &[u8]) -> [u8; 16] {
        let mut cdb = [0; 16];
        cdb[..bytes.len()].copy_from_slice(bytes);
        cdb
    }

    #[test]
    fn sbc_reads_and_writes_name_bytes_of_the_disk() {
        let read = cdb(&[0x28, 0, 0, 0, 0, 8, 0, 0, 8]);
        let (offset, bytes) = (8 * 512, 8 * 512);
        assert_eq!(decide(&read, 0, DISK), Action::Read { offset, bytes });
        let write = cdb(&[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 1]);
        let (offset, bytes) = (16 * 512, 512);
        assert_eq!(decide(&write, 0, DISK), Action::Write { offset, bytes });
    }

    #[test]
    fn sbc_a_command_beyond_the_disk_is_refused_and_so_is_an_unknown_one() {
        let beyond = cdb(&[0x28, 0, 0, 0x1f, 0xff, 0xff, 0, 0, 2]);
        assert_eq!(decide(&beyond, 0, DISK), OUT_OF_RANGE);
        let capacity = decide(&cdb(&[0x25]), 0, DISK);
        assert_eq!(
            capacity,
            Action::Answer(vec![0, 0x1f, 0xff, 0xff, 0, 0, 2, 0])
        );
        assert!(matches!(decide(&cdb(&[0x5f]), 0, DISK), Action::Refuse(_)));
        assert!(matches!(decide(&cdb(&[0x00]), 1, DISK), Action::Refuse(_)));
    }
}
