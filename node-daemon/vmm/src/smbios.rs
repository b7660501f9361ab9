//! SMBIOS tables (DMTF DSP0134, 3.0): who the machine is, for guests that ask by `dmidecode`, cloud-init or a licence.
//!
//! The entry point is at 0xF0000, where edk2's CloudHv platform reads it (`GetCloudHvSmbiosTables`) and where Linux
//! without EFI searches for it; the structures follow it.

use bascule_types::VmUid;
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
};

use crate::layout;
use crate::memory::GuestMemory;

/// Length of the entry point.
const ENTRY_BYTES: u8 = 24;
/// A handle that names no structure.
const NO_HANDLE: u16 = 0xFFFE;
const MIB: u64 = 1 << 20;
const MANUFACTURER: &str = "Bascule";
const PRODUCT: &str = "Virtual Machine";
/// Rises with every change that a guest may see.
const MACHINE_VERSION: &str = "1";
const RELEASE_DATE: &str = "11/28/2026";

/// Writes entry point and structures into `memory`, for the machine `uid`.
pub(crate) fn write(memory: &GuestMemory, uid: VmUid) -> Result<(), GuestMemoryError> {
    let ranges: Vec<_> = memory
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect();
    let at = layout::SMBIOS_START + u64::from(ENTRY_BYTES);
    let structures = structures(uid, &ranges);
    memory.write_slice(&structures, GuestAddress(at))?;
    memory.write_slice(
        &entry_point(at, structures.len()),
        GuestAddress(layout::SMBIOS_START),
    )
}

/// The 64-bit entry point (5.2.2) of `length` bytes of structures at `address`.
fn entry_point(address: u64, length: usize) -> Vec<u8> {
    let mut entry = b"_SM3_\0".to_vec();
    // Length, version 3.0, document revision, entry point revision, reserved.
    entry.extend([ENTRY_BYTES, 3, 0, 0, 1, 0]);
    entry.extend(u32::try_from(length).unwrap_or(0).to_le_bytes());
    entry.extend(address.to_le_bytes());
    let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = entry.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    entry
}

/// All structures of the machine `uid` with RAM at `ranges`, start and length of each.
fn structures(uid: VmUid, ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut tables = Tables::default();
    tables.firmware();
    tables.system(uid);
    tables.chassis();
    tables.memory(ranges);
    tables.add(32, &[0; 7], &[]);
    tables.add(127, &[], &[]);
    tables.bytes
}

/// Structures one after another; the handle of each is its number.
#[derive(Default)]
struct Tables {
    bytes: Vec<u8>,
    handle_next: u16,
}

impl Tables {
    /// Adds a structure (6.1.2, 6.1.3) of `fields` and its strings, to which fields refer by number from 1.
    fn add(&mut self, kind: u8, fields: &[u8], strings: &[&str]) -> u16 {
        let handle = self.handle_next;
        self.handle_next += 1;
        let length = u8::try_from(fields.len() + 4).unwrap_or(u8::MAX);
        self.bytes.extend([kind, length]);
        self.bytes.extend(handle.to_le_bytes());
        self.bytes.extend(fields);
        for string in strings {
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        handle
    }

    /// Type 0 (7.1).
    fn firmware(&mut self) {
        let mut fields = Fields::default();
        // Vendor, version, start segment, release date, ROM size.
        fields.bytes(&[1, 2]).word(0xE800).bytes(&[3, 0]);
        // Characteristics are not supported; this is a virtual machine.
        fields.quad(1 << 3).bytes(&[0, 1 << 4]);
        // No release numbers of firmware and embedded controller.
        fields.bytes(&[0, 0, 0xFF, 0xFF]);
        let strings = [MANUFACTURER, MACHINE_VERSION, RELEASE_DATE];
        self.add(0, &fields.0, &strings);
    }

    /// Type 1 (7.2).
    fn system(&mut self, uid: VmUid) {
        let serial = uid.to_string();
        let mut fields = Fields::default();
        fields.bytes(&[1, 2, 3, 4]).bytes(&wire_uuid(uid));
        // Woken up by the power switch; no SKU, no family.
        fields.bytes(&[6, 0, 0]);
        let strings = [MANUFACTURER, PRODUCT, MACHINE_VERSION, &serial];
        self.add(1, &fields.0, &strings);
    }

    /// Type 3 (7.4).
    fn chassis(&mut self) {
        let mut fields = Fields::default();
        // Manufacturer, type "other", no version, serial and asset number; states safe, security unknown.
        fields.bytes(&[1, 1, 0, 0, 0]).bytes(&[3, 3, 3, 2]);
        // OEM; height, power cords, contained elements, their length, SKU.
        fields.double(0).bytes(&[0, 0, 0, 0, 0]);
        self.add(3, &fields.0, &[MANUFACTURER]);
    }

    /// Types 16, 17 and 19 (7.17, 7.18, 7.20): one array with one device, mapped at `ranges`.
    fn memory(&mut self, ranges: &[(u64, u64)]) {
        let size: u64 = ranges.iter().map(|(_, length)| length).sum();
        let mut array = Fields::default();
        // Location "other", system memory, no error correction; capacity in the extended field.
        array.bytes(&[1, 3, 3]).double(0x8000_0000).word(NO_HANDLE);
        array.word(1).quad(size);
        let array = self.add(16, &array.0, &[]);
        let mut device = Fields::default();
        device.word(array).word(NO_HANDLE);
        // Widths unknown; size in the extended field; a DIMM in no set, "DIMM 0"; RAM, "other", speed unknown.
        device.word(0xFFFF).word(0xFFFF).word(0x7FFF);
        device.bytes(&[9, 0, 1, 0, 7]).word(1 << 1).word(0);
        // Manufacturer; no serial, asset and part number, rank unknown.
        device.bytes(&[2, 0, 0, 0, 0]);
        device.double(u32::try_from(size / MIB).unwrap_or(u32::MAX));
        // Configured speed and voltages unknown.
        device.word(0).word(0).word(0).word(0);
        self.add(17, &device.0, &["DIMM 0", MANUFACTURER]);
        for (start, length) in ranges {
            let mut mapped = Fields::default();
            // Addresses in the extended fields; one device per row.
            mapped.double(u32::MAX).double(u32::MAX).word(array);
            mapped.bytes(&[1]).quad(*start).quad(start + length - 1);
            self.add(19, &mapped.0, &[]);
        }
    }
}

/// The fields of a structure after its header.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    fn word(&mut self, word: u16) -> &mut Self {
        self.bytes(&word.to_le_bytes())
    }

    fn double(&mut self, double: u32) -> &mut Self {
        self.bytes(&double.to_le_bytes())
    }

    fn quad(&mut self, quad: u64) -> &mut Self {
        self.bytes(&quad.to_le_bytes())
    }
}

/// A UUID as SMBIOS has it: its first three fields are little-endian (7.2.1).
fn wire_uuid(uid: VmUid) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uid.to_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

#[cfg(test)]
mod tests {
    use bascule_types::Bytes;

    use super::*;

    const UID: &str = "6fa459ea-ee8a-4ca4-894e-db77e160355e";

    /// The structures of a table: type, bytes before the strings, strings.
    fn parse(mut table: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, length, ..] = *table {
            let (fixed, rest) = table.split_at(length.into());
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = rest[..end].split(|byte| *byte == 0);
            let strings = strings
                .filter(|string| !string.is_empty())
                .map(|string| String::from_utf8(string.to_vec()).unwrap());
            found.push((kind, fixed.to_vec(), strings.collect()));
            table = &rest[end + 2..];
        }
        found
    }

    /// Guests keep what they have read: no byte may change without another [`MACHINE_VERSION`].
    #[test]
    fn the_tables_are_these_bytes() {
        let ranges = [(0, 0xB000_0000), (1 << 32, 0x5000_0000)];
        let table = structures(UID.parse().unwrap(), &ranges);
        let golden = include_bytes!("smbios/golden-1.bin");
        assert!(table == golden, "{table:02x?}");
    }

    #[test]
    fn dsp0134_5_2_2_the_entry_point_is_where_firmware_and_kernels_look_and_sums_to_zero() {
        let memory = crate::memory::create(Bytes::mib(16)).unwrap();
        write(&memory, UID.parse().unwrap()).unwrap();
        let mut entry = [0; 24];
        memory
            .read_slice(&mut entry, GuestAddress(0xF_0000))
            .unwrap();
        assert_eq!(&entry[..5], b"_SM3_");
        let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((entry[6], sum), (24, 0));
        let length = u32::from_le_bytes(entry[12..16].try_into().unwrap());
        let address = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        let mut table = vec![0; length as usize];
        memory
            .read_slice(&mut table, GuestAddress(address))
            .unwrap();
        let kinds: Vec<u8> = parse(&table).iter().map(|found| found.0).collect();
        assert_eq!(kinds, [0, 1, 3, 16, 17, 19, 32, 127]);
        assert!(address + u64::from(length) <= layout::RESET_VECTOR);
    }

    /// 7.2.1: the text 00112233-4455-6677-8899-AABBCCDDEEFF is 33 22 11 00 55 44 77 66 88 99 AA BB CC DD EE FF.
    #[test]
    fn dsp0134_7_2_1_the_uuid_has_its_wire_format_and_is_the_serial_number() {
        let uid = "00112233-4455-6677-8899-aabbccddeeff";
        let table = parse(&structures(uid.parse().unwrap(), &[(0, 1 << 24)]));
        let (kind, system, strings) = &table[1];
        assert_eq!((*kind, system.len()), (1, 0x1B));
        let expected = [
            0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD,
            0xEE, 0xFF,
        ];
        assert_eq!(system[8..24], expected);
        assert_eq!(strings[usize::from(system[7]) - 1], uid);
        assert_eq!(strings[0], "Bascule");
    }

    #[test]
    fn dsp0134_7_18_the_memory_is_one_device_mapped_below_and_above_the_hole() {
        let low = 0xB000_0000;
        let ranges = [(0, low), (1 << 32, (8 << 30) - low)];
        let table = parse(&structures(UID.parse().unwrap(), &ranges));
        let lengths: Vec<_> = table.iter().map(|found| found.1.len()).collect();
        assert_eq!(lengths, [0x18, 0x1B, 0x16, 0x17, 0x28, 0x1F, 0x1F, 0x0B, 4]);
        let device = &table[4].1;
        assert_eq!(device[0x0C..0x0E], [0xFF, 0x7F]);
        assert_eq!(device[0x1C..0x20], 8192_u32.to_le_bytes());
        let high = &table[6].1;
        assert_eq!(high[0x0F..0x17], (1_u64 << 32).to_le_bytes());
        let last = (1_u64 << 32) + (8 << 30) - low - 1;
        assert_eq!(high[0x17..0x1F], last.to_le_bytes());
    }
}
