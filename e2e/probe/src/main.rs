//! The probe guest: it makes lost or repeated work of its disk, memory, network and clock visible from
//! outside.
//!
//! It boots by PVH, goes to ring 3 at once and polls: no interrupts, no operating system, so it
//! runs wherever KVM runs, at full speed even where ring 0 is interpreted. It answers ARP and ping,
//! counts lines in TCP sessions, echoes UDP and lines of its console, checks its disk and its memory, and ticks on the
//! console. It has a small agent, where it has a port for one. Or it does nothing but harm: `hostile.rs`. What it understands is in `bascule_probe_wire::options`, what it reports in
//! `bascule_probe_wire::guest_report`; console lines that start with `bad:` are findings.
//!
//! Start reading at [`probe_main`]; how the machine gets there is in `boot.rs`.

#![no_std]
#![no_main]

mod acpi;
mod agent;
mod arena;
mod boot;
mod clock;
mod disk;
mod hal;
mod hostile;
mod memory;
mod network;
mod nic;
mod once;
mod panic_device;
mod pci;
mod port;
mod runtime;
mod serial;

use bascule_probe_wire::guest_report::Report;
use bascule_probe_wire::options::Options;
use bascule_probe_wire::pattern::mix;

use crate::acpi::Power;
use crate::agent::Agent;
use crate::boot::Machine;
use crate::clock::Clock;
use crate::disk::Disk;
use crate::memory::Memory;
use crate::network::{Command, Network};
use crate::nic::Nic;
use crate::serial::{Console, Typed};

/// Where `boot.rs` arrives in ring 3.
#[unsafe(no_mangle)]
extern "C" fn probe_main(start_info: u64) -> ! {
    let console = Console::new(true);
    // SAFETY: `boot.rs` passes what the loader left in EBX, and nothing was written since.
    let Some(machine) = (unsafe { Machine::read(start_info) }) else {
        panic!("the loader passed no PVH start info");
    };
    let options = Options::parse(machine.cmdline).unwrap_or_else(|word| {
        console.line(format_args!("bad: option not understood: {word}"));
        Options::default()
    });
    // SAFETY: the tables are where the loader put them: nothing has been written yet.
    let power = unsafe { Power::read(machine.rsdp, options.button) };
    match options.hostile {
        Some(seed) => hostile::run(&machine, power, seed),
        None => Guest::new(&machine, power, options).run(),
    }
}

struct Guest {
    console: Console,
    clock: Clock,
    power: Power,
    options: Options,
    report: Report,
    network: Option<Network>,
    disk: Option<Disk>,
    agent: Option<Agent>,
    memory: Memory,
    next_tick_us: u64,
    next_button_us: u64,
    last_loop_us: u64,
    printed_ack: u64,
    typed: Typed,
}

impl Guest {
    fn new(machine: &Machine, power: Power, options: Options) -> Self {
        let console = Console::new(options.string_io);
        let boot = mix(clock::counter());
        let clock = Clock::new(options.tsc_khz);
        let config = options.ecam.map_or(pci::Config::Ports, pci::Config::Memory);
        let found = pci::find(config);
        let nic = found.nic.and_then(Nic::new);
        let mac = nic.as_ref().map_or([0; 6], Nic::mac);
        let network = nic.and_then(|nic| Network::new(nic, &options, boot));
        let address = options.ip.map_or([0; 4], |(address, _)| address);
        let wanted_agent = found.agent.filter(|_| options.agent);
        let agent = wanted_agent.and_then(|transport| Agent::new(transport, (mac, address)));
        let wanted_disk = found.disk.filter(|_| options.disk);
        let disk = wanted_disk.and_then(|transport| Disk::new(transport, &options, boot));
        console.line(format_args!(
            "probe boot={boot} ram={}M tsc_khz={} virtio={} net={} disk={}",
            machine.ram.1 >> 20,
            clock.khz,
            found.devices,
            u8::from(network.is_some()),
            u8::from(disk.is_some()),
        ));
        let memory = Memory::new(machine.ram, &options, console);
        let report = Report {
            boot,
            ..Report::default()
        };
        Self {
            console,
            clock,
            power,
            options,
            report,
            network,
            disk,
            agent,
            memory,
            next_tick_us: 0,
            next_button_us: 0,
            last_loop_us: clock.now_us(),
            printed_ack: 0,
            typed: Typed::new(),
        }
    }

    fn run(mut self) -> ! {
        loop {
            let now_us = self.clock.now_us();
            self.keep_time(now_us);
            let network = self.network.as_mut();
            let command =
                network.and_then(|net| net.poll(now_us, &mut self.report, &mut self.options));
            if let Some(disk) = &mut self.disk {
                disk.poll(now_us, &mut self.report, &self.options, self.console);
            }
            self.memory.poll(now_us, &mut self.report, self.console);
            let console = self.console;
            if self.agent.as_mut().is_some_and(|agent| agent.poll(console)) {
                self.power.off();
            }
            if let Some(command) = command {
                self.obey(command, now_us);
            }
        }
    }

    fn keep_time(&mut self, now_us: u64) {
        let stall_us = now_us.saturating_sub(self.last_loop_us);
        self.report.stall_us_max = self.report.stall_us_max.max(stall_us);
        self.report.up_ms = now_us / 1000;
        self.last_loop_us = now_us;
        if self.options.tick_ms > 0 && now_us >= self.next_tick_us {
            self.report.ticks += 1;
            self.tick(now_us);
            self.typed.echo(self.console);
            // Missed ticks are not sent later: the gap is what the watcher measures.
            self.next_tick_us = now_us + self.options.tick_ms * 1000;
        }
        if now_us >= self.next_button_us {
            self.next_button_us = now_us + BUTTON_PERIOD_US;
            if self.power.button_pressed() {
                self.console.line(format_args!("power button"));
                self.power.off();
            }
        }
    }

    /// `t <number> <microseconds>`, and `a <number>` behind it when the disk acknowledged more.
    fn tick(&mut self, now_us: u64) {
        let number = self.report.ticks;
        if self.report.disk_ack > self.printed_ack {
            self.printed_ack = self.report.disk_ack;
            self.console
                .line(format_args!("t {number} {now_us} a {}", self.printed_ack));
        } else {
            self.console.line(format_args!("t {number} {now_us}"));
        }
    }

    fn obey(&mut self, command: Command, now_us: u64) {
        match command {
            Command::PowerOff => {
                self.console.line(format_args!("power off"));
                self.power.off()
            }
            Command::Reset => self.power.reset(),
            Command::Fault => {
                self.console.line(format_args!("fault"));
                // SAFETY: an undefined instruction; without a handler this ends the machine.
                unsafe { core::arch::asm!("ud2", options(noreturn)) }
            }
            Command::Panic(event, goes_on) => {
                self.console.line(format_args!("panic {event:?}"));
                if panic_device::tell(event).is_none() {
                    self.console
                        .line(format_args!("bad: no pvpanic device knows {event:?}"));
                }
                if !goes_on {
                    loop {
                        core::hint::spin_loop();
                    }
                }
            }
            Command::Changed => {
                self.memory.configure(&self.options, now_us, self.console);
                self.next_tick_us = now_us;
            }
        }
    }
}

const BUTTON_PERIOD_US: u64 = 50_000;
