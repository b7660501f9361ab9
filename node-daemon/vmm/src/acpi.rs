//! ACPI tables (ACPI 6.5): a hardware-reduced machine with a PCI host bridge, a serial port, a
//! power button behind a generic event device, and a pvpanic device.

mod dsdt;
mod oem;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use self::oem::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;
use crate::memory::GuestMemory;
use crate::power;
use crate::rtc;

/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 16;
/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.10): no VGA, no PCIe ASPM.
const BOOT_ARCH: u16 = (1 << 2) | (1 << 4);

/// Writes all tables; the root pointer's address.
pub(crate) fn write(memory: &GuestMemory, cpus: u32) -> Result<GuestAddress, GuestMemoryError> {
    let mut writer = Writer {
        memory,
        next: layout::ACPI_START,
    };
    let rsdp = writer.reserve(Rsdp::len());
    let dsdt = writer.write(dsdt::build().as_slice())?;
    let tables = [
        writer.write(&bytes(&fadt(dsdt)))?,
        writer.write(&bytes(&madt(cpus)))?,
        writer.write(&bytes(&mcfg()))?,
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = writer.write(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(rsdp))?;
    Ok(GuestAddress(rsdp))
}

/// Places tables one after another.
struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    fn reserve(&mut self, length: usize) -> u64 {
        let at = self.next;
        let length = u64::try_from(length).unwrap_or(layout::ACPI_SIZE);
        self.next = (at + length).next_multiple_of(ALIGNMENT);
        at
    }

    fn write(&mut self, table: &[u8]) -> Result<u64, GuestMemoryError> {
        let at = self.reserve(table.len());
        if self.next > layout::ACPI_START + layout::ACPI_SIZE {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(at)));
        }
        self.memory.write_slice(table, GuestAddress(at))?;
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt);
    fadt.preferred_pm_profile = PmProfile::EnterpriseServer as u8;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.century = rtc::CENTURY;
    fadt.reset_reg = byte_port(layout::ACPI_RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = byte_port(layout::ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(layout::ACPI_SLEEP_STATUS_PORT);
    // Ignored on a hardware-reduced machine by the specification, and used by Linux all the same.
    fadt.pm_tmr_blk = u32::from(layout::ACPI_PM_TIMER_PORT).into();
    fadt.pm_tmr_len = layout::ACPI_PM_TIMER_PORTS;
    fadt.x_pm_tmr_blk = GAS::new(
        AddressSpace::SystemIo,
        32,
        0,
        AccessSize::DwordAccess,
        layout::ACPI_PM_TIMER_PORT.into(),
    );
    fadt.finalize()
}

fn byte_port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

fn madt(cpus: u32) -> MADT {
    let lapic = u32::try_from(layout::LAPIC_START).unwrap_or(0);
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(lapic),
    );
    for cpu in (0..=u8::MAX).take(usize::try_from(cpus).unwrap_or(0)) {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    let ioapic = u32::try_from(layout::IOAPIC_START).unwrap_or(0);
    madt.add_structure(IoApic::new(0, ioapic, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use bascule_types::Bytes;

    fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut table = vec![0; length as usize];
        memory.read_slice(&mut table, GuestAddress(at)).unwrap();
        table
    }

    fn sum(table: &[u8]) -> u8 {
        table
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    /// ACPI 6.5, tables 5.9 and 5.10: 108 CENTURY, 109 IAPC_BOOT_ARCH.
    #[test]
    fn acpi_5_2_9_there_is_a_cmos_clock_with_a_century() {
        let fadt = bytes(&fadt(0));
        assert_eq!(fadt[108], 0x32);
        assert_eq!(fadt[109] & (1 << 5), 0, "CMOS RTC Not Present");
    }

    /// ACPI 6.5, table 5.9: 76 PM_TMR_BLK, 91 PM_TMR_LEN, 112 flags, 208 X_PM_TMR_BLK.
    #[test]
    fn acpi_5_2_9_the_power_management_timer_is_named_with_its_32_bits() {
        let fadt = bytes(&fadt(0));
        assert_eq!(fadt[76..80], 0x608_u32.to_le_bytes());
        assert_eq!(fadt[91], 4);
        assert_eq!(fadt[113] & 1, 1, "TMR_VAL_EXT");
        assert_eq!(fadt[208..220], [1, 32, 0, 3, 0x08, 0x06, 0, 0, 0, 0, 0, 0]);
    }

    /// ACPI 6.5, 6.4.2.5: an I/O port descriptor is 0x47, the decoding, minimum, maximum, alignment, length.
    #[test]
    fn pvpanic_its_driver_finds_its_port_by_the_name_of_qemu() {
        let dsdt = dsdt::build().as_slice().to_vec();
        let find = |wanted: &[u8]| dsdt.windows(wanted.len()).position(|bytes| bytes == wanted);
        let device = find(b"PEVT").unwrap();
        let name = find(b"_HID\x0DQEMU0001\0").unwrap();
        let port = find(&[0x47, 1, 0x05, 0x05, 0x05, 0x05, 1, 1]).unwrap();
        assert!(device < name && name < port);
        let behind = |wanted: &[u8]| find(wanted).is_none_or(|at| at < device || at > port);
        let others: [&[u8]; 4] = [b"MBRD", b"COM1", b"GED_", b"_S5_"];
        assert!(others.iter().all(|other| behind(other)), "it is its own");
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_to_zero() {
        let memory = crate::memory::create(Bytes::mib(64)).unwrap();
        let rsdp = write(&memory, 254).unwrap();
        let mut root = [0; 36];
        memory.read_slice(&mut root, rsdp).unwrap();
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(sum(&root), 0);
        let xsdt = table(
            &memory,
            u64::from_le_bytes(root[24..32].try_into().unwrap()),
        );
        assert_eq!(sum(&xsdt), 0);
        let mut found = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let table = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&table), 0, "{:?}", std::str::from_utf8(&table[..4]));
            if &table[..4] == b"FACP" {
                let dsdt = u64::from_le_bytes(table[140..148].try_into().unwrap());
                let dsdt = self::table(&memory, dsdt);
                assert_eq!((&dsdt[..4], sum(&dsdt)), (b"DSDT".as_slice(), 0));
            }
            found.push(table[..4].to_vec());
        }
        assert_eq!(found, [b"FACP", b"APIC", b"MCFG"]);
    }
}
