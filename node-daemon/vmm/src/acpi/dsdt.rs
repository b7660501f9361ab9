//! The differentiated system description table (DSDT): devices that cannot be discovered.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::oem::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::{layout, power};

/// DSDT revision: 64-bit integers.
const REVISION: u8 = 2;
/// Length of a table's header.
const HEADER_BYTES: u32 = 36;
/// Notification of a pressed power button (ACPI 6.5, 4.8.2.2.1.2).
const NOTIFY_PRESSED: u8 = 0x80;

pub(super) fn build() -> Sdt {
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let mut body = Vec::new();
    for device in [
        motherboard(),
        pci_root(),
        serial_port(),
        clock(),
        power_button(),
        event_device(),
        panic_device(),
    ] {
        body.extend(device);
    }
    let mut scope = Vec::new();
    let devices = Raw(body);
    Scope::new("\\_SB_".into(), vec![&devices]).to_aml_bytes(&mut scope);
    dsdt.append_slice(&scope);
    dsdt.append_slice(&sleep_state());
    dsdt
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

/// Reserves the PCI configuration window, without which Linux does not use it, and the ports of the
/// power registers and the power management timer.
fn motherboard() -> Vec<u8> {
    let window = Memory32Fixed::new(true, low(layout::ECAM_START), low(layout::ECAM_BUS_SIZE));
    let power_ports = IO::new(
        layout::ACPI_SLEEP_CONTROL_PORT,
        layout::ACPI_SLEEP_CONTROL_PORT,
        1,
        4,
    );
    let timer_ports = IO::new(
        layout::ACPI_PM_TIMER_PORT,
        layout::ACPI_PM_TIMER_PORT,
        1,
        layout::ACPI_PM_TIMER_PORTS,
    );
    bytes(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&window, &power_ports, &timer_ports]),
            ),
        ],
    ))
}

fn pci_root() -> Vec<u8> {
    let bus = AddressSpace::new_bus_number(0_u16, 0_u16);
    let config = IO::new(
        layout::PCI_CONFIG_ADDRESS_PORT,
        layout::PCI_CONFIG_ADDRESS_PORT,
        1,
        8,
    );
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low(layout::PCI_MMIO_START),
        low(layout::PCI_MMIO_END) - 1,
        None,
    );
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&bus, &config, &window]),
            ),
        ],
    ))
}

fn serial_port() -> Vec<u8> {
    let ports = IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::COM1_GSI);
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&ports, &interrupt]),
            ),
        ],
    ))
}

/// The CMOS clock, without an interrupt.
fn clock() -> Vec<u8> {
    let ports = IO::new(layout::RTC_INDEX_PORT, layout::RTC_INDEX_PORT, 1, 2);
    bytes(&Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    ))
}

/// Generic event device (ACPI 6.5, 5.6.9): its interrupt means that events are pending in the event register.
fn event_device() -> Vec<u8> {
    let interrupt = Interrupt::new(true, true, false, false, layout::GED_GSI);
    let port = layout::ACPI_EVENT_PORT;
    let pressed = And::new(&ZERO, &Local(0), &power::EVENT_POWER_BUTTON);
    let events = Path::new("EVNT");
    let button = Path::new("PWRB");
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new("EVRG".into(), OpRegionSpace::SystemIO, &port, &ONE),
            &Field::new(
                "EVRG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::Preserve,
                vec![FieldEntry::Named(*b"EVNT", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &events),
                    &If::new(&pressed, vec![&Notify::new(&button, &NOTIFY_PRESSED)]),
                ],
            ),
        ],
    ))
}

/// pvpanic (QEMU, docs/specs/pvpanic.rst), whose driver in the guest finds its port here.
fn panic_device() -> Vec<u8> {
    let port = IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, 1);
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    ))
}

/// `\_S5_`: the sleep type that switches off.
fn sleep_state() -> Vec<u8> {
    let sleep_type = power::SLEEP_TYPE_S5;
    bytes(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO]),
    ))
}
