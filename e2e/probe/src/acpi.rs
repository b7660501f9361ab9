//! The part of ACPI (6.5, chapters 4 and 5) needed to power off and to detect the power button.

use crate::boot::read_at;
use crate::port;

/// How this machine is switched off, and where its power button shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Power {
    off: Off,
    button: Button,
    reset: (u16, u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Off {
    /// 16-bit write to the PM1a control block.
    Pm1Control(u16, u16),
    /// 8-bit write to the sleep control register of a hardware-reduced machine.
    SleepControl(Register, u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Button {
    /// Bit 8 of the PM1 event block at this port; writing it clears it.
    Pm1Event(u16),
    /// Bit 0 of this port; reading it clears it.
    EventRegister(u16),
    /// There is none that a polling guest could see.
    Nowhere,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Port(u16),
    Memory(u64),
}

impl Power {
    /// Reads the tables that start at `rsdp`. `event_port` is where the command line says that the
    /// power button shows.
    ///
    /// # Safety
    /// `rsdp` must be 0 or the address of the loader's ACPI tables, still in memory.
    pub(crate) unsafe fn read(rsdp: u64, event_port: Option<u16>) -> Self {
        let mut power = Self::DEFAULT;
        // SAFETY: the caller vouches for the tables.
        if let Some(fadt) = (rsdp != 0).then(|| unsafe { fadt_of(rsdp) }).flatten() {
            // SAFETY: the address is that of a table of the loader's.
            power = unsafe { Self::from_fadt(fadt) };
        }
        if let Some(port) = event_port {
            power.button = Button::EventRegister(port);
        }
        power
    }

    /// # Safety
    /// `fadt` must be the address of a Fixed ACPI Description Table.
    unsafe fn from_fadt(fadt: u64) -> Self {
        // SAFETY: the fields lie within the table, as the caller says (here and below).
        let flags = unsafe { read_at::<u32>(fadt + 112) };
        // SAFETY: as above.
        let sleep_type = unsafe { s5_type(fadt) };
        let mut power = Self::DEFAULT;
        if flags & HW_REDUCED != 0 {
            // SAFETY: as above.
            if let Some(register) = unsafe { register_at(fadt + 244) } {
                power.off = Off::SleepControl(register, (sleep_type << 2) | 0x20);
            }
        } else {
            // SAFETY: as above.
            let event = unsafe { read_at::<u32>(fadt + 56) };
            // SAFETY: as above.
            let control = unsafe { read_at::<u32>(fadt + 64) };
            power.off = Off::Pm1Control(control as u16, (u16::from(sleep_type) << 10) | 0x2000);
            if event != 0 {
                // Machines show a press only to a guest that enabled the event. The interrupt that
                // comes with it is never taken.
                port::write16(event as u16 + 2, BUTTON_STATUS);
                power.button = Button::Pm1Event(event as u16);
            }
        }
        if flags & RESET_REG_SUPPORTED != 0 {
            // SAFETY: as above.
            if let Some(Register::Port(port)) = unsafe { register_at(fadt + 116) } {
                // SAFETY: as above.
                power.reset = (port, unsafe { read_at::<u8>(fadt + 128) });
            }
        }
        power
    }

    /// Whether the power button was pressed since the last call.
    pub(crate) fn button_pressed(&self) -> bool {
        match self.button {
            Button::Pm1Event(port) => {
                let pressed = port::read16(port) & BUTTON_STATUS != 0;
                if pressed {
                    port::write16(port, BUTTON_STATUS);
                }
                pressed
            }
            Button::EventRegister(port) => port::read8(port) & 1 != 0,
            Button::Nowhere => false,
        }
    }

    /// Switches the machine off.
    pub(crate) fn off(&self) -> ! {
        match self.off {
            Off::Pm1Control(port, value) => port::write16(port, value),
            Off::SleepControl(Register::Port(port), value) => port::write8(port, value),
            // SAFETY: the table says that the register is there; it is mapped.
            Off::SleepControl(Register::Memory(address), value) => unsafe {
                (address as usize as *mut u8).write_volatile(value);
            },
        }
        wait_for_the_end()
    }

    /// Resets the machine.
    pub(crate) fn reset(&self) -> ! {
        port::write8(self.reset.0, self.reset.1);
        wait_for_the_end()
    }

    /// What PC machines without usable tables have: PM1a control at 0x604, the reset port 0xCF9.
    const DEFAULT: Self = Self {
        off: Off::Pm1Control(0x604, 0x2000),
        button: Button::Nowhere,
        reset: (0xcf9, 0x0e),
    };
}

fn wait_for_the_end() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// # Safety
/// `rsdp` must be the address of a Root System Description Pointer whose tables are in memory.
unsafe fn fadt_of(rsdp: u64) -> Option<u64> {
    // SAFETY: the caller vouches for the tables (here and below).
    let revision = unsafe { read_at::<u8>(rsdp + 15) };
    let (root, entry_bytes) = if revision >= 2 {
        // SAFETY: as above.
        (unsafe { read_at::<u64>(rsdp + 24) }, 8)
    } else {
        // SAFETY: as above.
        (u64::from(unsafe { read_at::<u32>(rsdp + 16) }), 4)
    };
    // SAFETY: as above.
    let length = unsafe { read_at::<u32>(root + 4) };
    let entries = u64::from(length).saturating_sub(HEADER_BYTES) / entry_bytes;
    (0..entries).find_map(|index| {
        let place = root + HEADER_BYTES + index * entry_bytes;
        let table = if entry_bytes == 8 {
            // SAFETY: as above.
            unsafe { read_at::<u64>(place) }
        } else {
            // SAFETY: as above.
            u64::from(unsafe { read_at::<u32>(place) })
        };
        // SAFETY: as above.
        let signature = unsafe { read_at::<[u8; 4]>(table) };
        (signature == *b"FACP").then_some(table)
    })
}

/// A generic address structure (ACPI 6.5, 5.2.3.2); none when it is empty.
///
/// # Safety
/// `address` must be that of such a structure.
unsafe fn register_at(address: u64) -> Option<Register> {
    // SAFETY: the caller says so.
    let space = unsafe { read_at::<u8>(address) };
    // SAFETY: as above.
    let value = unsafe { read_at::<u64>(address + 4) };
    match (space, value) {
        (_, 0) => None,
        (0, _) => Some(Register::Memory(value)),
        (1, _) => Some(Register::Port(value as u16)),
        _ => None,
    }
}

/// The sleep type of `\_S5_`, found by its name in the DSDT's byte code: `08 "_S5_" 12 length count
/// value`, the value a byte constant (0A xx), zero (00) or one (01).
///
/// # Safety
/// `fadt` must be the address of a Fixed ACPI Description Table.
unsafe fn s5_type(fadt: u64) -> u8 {
    // SAFETY: the caller says so (here and below); the DSDT is a table like any other.
    let dsdt = u64::from(unsafe { read_at::<u32>(fadt + 40) });
    // SAFETY: as above.
    let wide = unsafe { read_at::<u64>(fadt + 140) };
    let dsdt = if wide == 0 { dsdt } else { wide };
    if dsdt == 0 {
        return SLEEP_TYPE_USUAL;
    }
    // SAFETY: as above.
    let length = u64::from(unsafe { read_at::<u32>(dsdt + 4) });
    for offset in HEADER_BYTES..length.saturating_sub(12) {
        // SAFETY: the offset is below the table's length.
        let window = unsafe { read_at::<[u8; 10]>(dsdt + offset) };
        if window[..5] == *b"_S5_\x12" {
            return match window[7] {
                0x0a => window[8],
                value @ (0 | 1) => value,
                _ => SLEEP_TYPE_USUAL,
            };
        }
    }
    SLEEP_TYPE_USUAL
}

const HEADER_BYTES: u64 = 36;
const HW_REDUCED: u32 = 1 << 20;
const RESET_REG_SUPPORTED: u32 = 1 << 10;
const BUTTON_STATUS: u16 = 1 << 8;
/// What hardware-reduced machines commonly choose.
const SLEEP_TYPE_USUAL: u8 = 5;
