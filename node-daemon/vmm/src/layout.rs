//! The guest's physical address space and its I/O ports, in one place.
//!
//! ```text
//! 0x0000_0000  RAM, with boot structures in its first MiB
//! 0xB000_0000  PCI configuration space (ECAM), 256 MiB, bus 0 only is populated
//! 0xC000_0000  window for the BARs of PCI devices
//! 0xF000_0000  nothing
//! 0xFEC0_0000  I/O APIC          0xFEE0_0000  local APICs
//! 0xFFFB_C000  pages that KVM takes for itself on some processors
//! 0x1_0000_0000  RAM that did not fit below 0xB000_0000
//! ```
//!
//! A running guest relies on these addresses: none may change without a new state format.

/// End of the RAM below 4 GiB, and start of the hole.
pub const RAM_LOW_END: u64 = 0xB000_0000;
/// Start of the RAM above 4 GiB.
pub const RAM_HIGH_START: u64 = 0x1_0000_0000;
/// PCI configuration space (PCI Firmware 3.2, 4.1.2), 1 MiB per bus.
pub const ECAM_START: u64 = 0xB000_0000;
/// Size of the configuration space of the one bus that exists.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;
/// Start of the window for BARs.
pub const PCI_MMIO_START: u64 = 0xC000_0000;
/// End (exclusive) of the window for BARs.
pub const PCI_MMIO_END: u64 = 0xF000_0000;
/// I/O APIC (82093AA), emulated by KVM.
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Local APICs, emulated by KVM.
pub const LAPIC_START: u64 = 0xFEE0_0000;
/// A page that KVM needs on Intel processors without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages that KVM needs on Intel processors without unrestricted guests.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// The first serial port (16550A).
pub const COM1_PORT: u16 = 0x3F8;
/// Number of ports of a 16550A.
pub const COM1_PORTS: u16 = 8;
/// Interrupt line of the first serial port.
pub const COM1_GSI: u32 = 4;
/// Interrupt line of the generic event device (ACPI 6.5, 5.6.9).
pub const GED_GSI: u32 = 5;
/// ACPI sleep control register, one byte (ACPI 6.5, 4.8.3.7).
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register, one byte (ACPI 6.5, 4.8.3.7).
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, one byte (ACPI 6.5, 4.8.3.6).
pub const ACPI_RESET_PORT: u16 = 0x602;
/// Event register of the generic event device: the pending events; a read clears them.
pub const ACPI_EVENT_PORT: u16 = 0x603;
/// ACPI power management timer, four bytes (ACPI 6.5, 4.8.3.3), where edk2's CloudHv platform reads it.
pub const ACPI_PM_TIMER_PORT: u16 = 0x608;
/// Number of ports of the power management timer.
pub const ACPI_PM_TIMER_PORTS: u8 = 4;
/// pvpanic device, one byte (QEMU, docs/specs/pvpanic.rst).
pub const PVPANIC_PORT: u16 = 0x505;
/// Index port of the CMOS clock (MC146818A).
pub const RTC_INDEX_PORT: u16 = 0x70;
/// Data port of the CMOS clock.
pub const RTC_DATA_PORT: u16 = 0x71;
/// i8042 command port; a write of 0xFE pulses the reset line.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// PCI configuration mechanism #1, address register, four bytes.
pub const PCI_CONFIG_ADDRESS_PORT: u16 = 0xCF8;
/// PCI configuration mechanism #1, data window, four bytes.
pub const PCI_CONFIG_DATA_PORT: u16 = 0xCFC;

/// Global descriptor table of the boot processor.
pub const BOOT_GDT: u64 = 0x500;
/// Interrupt descriptor table of the boot processor: empty.
pub const BOOT_IDT: u64 = 0x520;
/// `hvm_start_info` of a PVH boot.
pub const PVH_START_INFO: u64 = 0x6000;
/// Memory map of a PVH boot.
pub const PVH_MEMMAP: u64 = 0x6100;
/// Module list (the initrd) of a PVH boot.
pub const PVH_MODULES: u64 = 0x6F00;
/// `boot_params` of a bzImage boot.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of a bzImage boot: the top level, then one page per level below.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// First stack of a bzImage boot: grows down from here.
pub const BOOT_STACK: u64 = 0x8FF0;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Largest command line, with its terminating zero (x86 `COMMAND_LINE_SIZE`).
pub const CMDLINE_SIZE_MAX: usize = 2048;
/// End of conventional memory: the extended BIOS data area would begin here.
pub const EBDA_START: u64 = 0x9_FC00;
/// ACPI tables, with the root pointer first, where guests search for it.
pub const ACPI_START: u64 = 0xE_0000;
/// Room for the ACPI tables.
pub const ACPI_SIZE: u64 = 0x1_0000;
/// SMBIOS entry point and tables, up to the reset vector.
pub const SMBIOS_START: u64 = 0xF_0000;
/// Reset vector of a PC, in real mode: a guest that jumps there requests a reset.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// Where the kernel goes: 1 MiB.
pub const HIMEM_START: u64 = 0x10_0000;
