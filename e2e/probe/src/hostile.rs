//! The hostile guest (`hostile=SEED`): it attacks every device that it finds, in numbered steps.
//!
//! What a step does follows from seed and number alone, so that any of them can be repeated. After each boot the
//! guest asks on the serial console for its work, `hostile boot SEED`, and is answered `from FIRST to END`; it says
//! `hostile at STEP` now and then, and `hostile done END` at the end, after which it waits for more. A machine that was
//! reset begins with the question: whoever answers knows how far it had come.
//!
//! Most steps break no rule for which a machine ends (a malformed chain of descriptors does): after one that
//! does, there is no guest left to go on.

mod access;
mod driver;
mod function;
mod playground;
mod queue;
mod random;
mod registers;
mod talk;

use self::function::{FUNCTIONS_MAX, Function};
use self::playground::Playground;
use self::random::Random;
use crate::acpi::Power;
use crate::boot::Machine;
use crate::port;
use crate::serial::{Console, Text};

/// Attacks the machine without an end.
pub(crate) fn run(machine: &Machine, power: Power, seed: u64) -> ! {
    let mut guest = Hostile {
        console: Console::new(true),
        power,
        seed,
        memory: Playground::new(machine.ram.0 + machine.ram.1),
        functions: function::find(),
    };
    guest.say(format_args!("hostile boot {seed}"));
    loop {
        let Some((first, end)) = guest.work() else {
            continue;
        };
        for step in first..end {
            if step.is_multiple_of(STEPS_PER_LINE) {
                guest.say(format_args!("hostile at {step}"));
            }
            guest.step(step);
        }
        guest.say(format_args!("hostile done {end}"));
    }
}

struct Hostile {
    console: Console,
    power: Power,
    seed: u64,
    memory: Playground,
    functions: [Option<Function>; FUNCTIONS_MAX],
}

impl Hostile {
    /// Reads a line of the console; the first step and the end that it orders.
    fn work(&self) -> Option<(u64, u64)> {
        let mut line = Text::<64>::new();
        loop {
            if port::read8(LINE_STATUS) & DATA_READY == 0 {
                continue;
            }
            let byte = port::read8(COM1);
            if byte == b'\n' {
                break;
            }
            line.push(byte);
        }
        let (first, end) = line.as_str().split_once(" to ")?;
        let first = first.rsplit_once("from ")?.1.parse().ok()?;
        Some((first, end.trim().parse().ok()?))
    }

    /// Says something whatever was done to the serial port.
    fn say(&self, text: core::fmt::Arguments<'_>) {
        for (register, value) in [(LINE_CONTROL, 3), (MODEM_CONTROL, 0), (COM1 + 1, 0)] {
            port::write8(register, value);
        }
        // What it has sent itself in loopback mode.
        for _ in 0..FIFO_BYTES {
            if port::read8(LINE_STATUS) & DATA_READY != 0 {
                port::read8(COM1);
            }
        }
        // Ends a line of garbage.
        self.console.line(format_args!(""));
        self.console.line(text);
    }

    fn step(&mut self, step: u64) {
        let random = &mut Random::of_step(self.seed, step);
        if random.chance(STEPS_PER_END) {
            self.end(step, random);
        }
        match random.below(64) {
            0..14 => registers::device_register(&self.functions, random),
            14..22 => registers::configuration(&self.functions, random),
            22..32 => registers::any_port(random),
            32..35 => registers::hole(random),
            35 => Playground::scribble(random),
            way => {
                let place = random.below(FUNCTIONS_MAX as u64) as usize;
                if let Some(function) = &mut self.functions[place]
                    && function.common != 0
                {
                    drive(function, way > 38, random, self.memory);
                }
            }
        }
    }

    /// Resets the machine, by its register or by a triple fault, or switches it off.
    fn end(&self, step: u64, random: &mut Random) {
        let ways = ["reset", "reset", "fault", "reset", "fault", "off"];
        let way = random.pick(&ways);
        self.say(format_args!("hostile at {step} {way}"));
        match way {
            "reset" => self.power.reset(),
            "off" => self.power.off(),
            // SAFETY: an undefined instruction; without a handler it is a triple fault.
            _ => unsafe { core::arch::asm!("ud2", options(noreturn)) },
        }
    }
}

/// Sets a device up if it is not, or at will; offers it requests otherwise, with a reset right behind some.
fn drive(function: &mut Function, only_offer: bool, random: &mut Random, memory: Playground) {
    let lives = function.rings.iter().any(Option::is_some) && function.is_running();
    if !lives || !only_offer {
        driver::configure(function, random, memory);
    }
    for _ in 0..=random.below(4) {
        driver::offer(function, random, memory);
    }
    if random.chance(64) {
        access::write(function.common + function::STATUS, 1, 0);
    }
}

const STEPS_PER_LINE: u64 = 64;
/// So many steps for each that resets the machine or switches it off.
const STEPS_PER_END: u64 = 1500;
const COM1: u16 = 0x3f8;
const LINE_CONTROL: u16 = COM1 + 3;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 1;
/// More than a 16550A holds.
const FIFO_BYTES: u32 = 80;
