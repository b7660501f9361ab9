//! What the targets of `fuzz/` drive in this crate: parsers of bytes that guests, users and peers choose. They need
//! neither KVM nor rights, and panic when what must hold of every input does not.

#![expect(
    clippy::unwrap_used,
    reason = "an expectation that does not hold is a finding"
)]

use std::io::{self, Cursor, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bascule_ipc::vm::{CONSOLE_HISTORY_BYTES, CloudInit, GuestInfo, PanicStatus, VmConfig};
use fatfs::{FileSystem, FsOptions};
use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootSource, Entry, Initrd};
use crate::clock::SystemClock;
use crate::console::SavedConsole;
use crate::memory::{self, GuestMemory, PAGE_SIZE};
use crate::pm_timer::PmTimer;
use crate::power::Power;
use crate::pvpanic::Pvpanic;
use crate::rtc::{RamSizes, Rtc, SavedRtc};
use crate::serial::{SavedSerial, SerialPort};
use crate::{Console, MachineState, guest_agent, layout, process};

/// A saved state of a machine with one vCPU, of version 1.
pub const MACHINE_STATE: &str = include_str!("state/golden-v1.json");

/// Loads a kernel of any bytes with an initrd of `initrd` bytes, of which only the first `there` can be read. What a
/// kernel that is accepted finds in memory is whole: its command line, its initrd, and where both are.
pub fn kernel(kernel: &[u8], cmdline: &str, initrd: Option<(u64, u64)>) {
    let memory = memory::create(memory::RAM_MIN).unwrap();
    let source = BootSource {
        kernel: kernel.to_vec(),
        initrd: initrd.map(|(length, there)| Initrd {
            length,
            content: Box::new(io::repeat(INITRD_BYTE).take(there)),
        }),
        cmdline: cmdline.to_owned(),
    };
    let entry = match boot::load(&memory, source, GuestAddress(layout::ACPI_START)) {
        Ok(entry) => entry,
        Err(error) => {
            let text = error.to_string();
            let names_its_field = text.starts_with("boot.") || text.starts_with("memory: ");
            assert!(names_its_field, "{text}");
            return;
        }
    };
    let (regs, sregs) = boot::registers(&memory, kvm_sregs::default(), entry).unwrap();
    let found = match entry {
        Entry::Pvh(address) => {
            assert_eq!((regs.rip, regs.rbx), (address, layout::PVH_START_INFO));
            pvh_start_info(&memory)
        }
        Entry::Linux64(address) => {
            assert_eq!((regs.rip, regs.rsi), (address, layout::ZERO_PAGE));
            assert_eq!(sregs.cr3, layout::BOOT_PAGE_TABLES);
            zero_page(&memory)
        }
    };
    let line = bytes_at(&memory, found.cmdline, cmdline.len() + 1);
    assert_eq!(line, [cmdline.as_bytes(), &[0]].concat());
    assert_eq!(found.rsdp, layout::ACPI_START);
    let length = initrd.map(|(length, there)| {
        assert!(there >= length, "an initrd that cannot be read");
        length
    });
    assert_eq!(found.initrd.map(|(_, length)| length), length);
    if let Some((start, length)) = found.initrd {
        assert!(start >= layout::HIMEM_START && start.is_multiple_of(PAGE_SIZE));
        let content = bytes_at(&memory, start, usize::try_from(length).unwrap());
        assert!(content.iter().all(|byte| *byte == INITRD_BYTE));
    }
}

/// What a kernel finds in its boot structures.
struct Found {
    cmdline: u64,
    rsdp: u64,
    /// Start and length; none without one.
    initrd: Option<(u64, u64)>,
}

/// Xen, docs/misc/pvh.pandoc.
fn pvh_start_info(memory: &GuestMemory) -> Found {
    let quad = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    let modules = quad(layout::PVH_START_INFO + 8) >> 32;
    let list = quad(layout::PVH_START_INFO + 16);
    Found {
        cmdline: quad(layout::PVH_START_INFO + 24),
        rsdp: quad(layout::PVH_START_INFO + 32),
        initrd: (modules > 0).then(|| (quad(list), quad(list + 8))),
    }
}

/// Linux, Documentation/arch/x86/zero-page.rst.
fn zero_page(memory: &GuestMemory) -> Found {
    let word = |offset: u64| {
        let at = GuestAddress(layout::ZERO_PAGE + offset);
        u64::from(memory.read_obj::<u32>(at).unwrap())
    };
    let initrd = (word(0x218), word(0x21C));
    Found {
        cmdline: word(0x228),
        rsdp: word(0x70) | word(0x74) << 32,
        initrd: (initrd.0 > 0).then_some(initrd),
    }
}

fn bytes_at(memory: &GuestMemory, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// What a status shows of a guest whose agent says `said`, whatever it is asked, after each of `polls` polls.
pub fn agent_answers(said: &[u8], macs: &[[u8; 6]], polls: usize) -> Vec<Option<GuestInfo>> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(said).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    guest_agent::poll_with(ours, macs.to_vec(), polls)
}

/// Makes the disk for cloud-init of a VM with this name, or refuses to: a guest reads from it what the user wrote.
pub fn cloud_init_disk(name: &str, contents: &CloudInit) {
    let config = VmConfig {
        name: name.to_owned(),
        ..process::testing::config()
    };
    let Ok(image) = process::cloud_init_image(&config, contents) else {
        let texts = [Some(&contents.user_data), contents.network_config.as_ref()];
        let keys = contents.ssh_authorized_keys.iter();
        let length: usize = texts
            .into_iter()
            .flatten()
            .chain(keys)
            .map(String::len)
            .sum();
        assert!(length > CLOUD_INIT_FITS, "{length} bytes do not fit");
        return;
    };
    assert_eq!(process::cloud_init_image(&config, contents).unwrap(), image);
    let volume = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
    assert_eq!(volume.volume_label_as_bytes(), b"CIDATA");
    let read = |name: &str| {
        let mut file = volume.root_dir().open_file(name).ok()?;
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        Some(text)
    };
    let user_data = match contents.user_data.as_str() {
        "" => process::EMPTY_USER_DATA,
        given => given,
    };
    assert_eq!(read("user-data").as_deref(), Some(user_data));
    assert_eq!(read("network-config"), contents.network_config);
    let meta: serde_json::Value = serde_json::from_str(&read("meta-data").unwrap()).unwrap();
    assert_eq!(meta["instance-id"], config.uid.to_string());
    assert_eq!(meta["local-hostname"], name.rsplit('/').next().unwrap());
    let keys: Vec<String> = match meta.get("public-keys") {
        Some(keys) => serde_json::from_value(keys.clone()).unwrap(),
        None => vec![],
    };
    assert_eq!(keys, contents.ssh_authorized_keys);
    assert_eq!(
        volume.root_dir().iter().count(),
        2 + usize::from(contents.network_config.is_some())
    );
}

/// Restores what of a machine's state needs no KVM: each device takes or refuses it, keeps it within its bounds, and serves
/// any access afterwards.
pub fn restore_devices(state: &MachineState) {
    serial_port(&state.serial);
    if let Some(saved) = &state.console {
        console(saved);
    }
    if let Some(saved) = &state.rtc {
        cmos_clock(saved);
    }
    if let Some(age_ns) = state.pm_timer_ns {
        let timer = PmTimer::new(Arc::new(SystemClock));
        timer.restore(age_ns);
        assert!(timer.save().wrapping_sub(age_ns) < HOUR_NS, "it goes on");
        timer.read(3, &mut [0; 9]);
    }
    let power = Power::new(eventfd());
    power.restore(state.power_events);
    assert_eq!(power.save() & !state.power_events, 0);
    panics(state.panics);
    for vcpu in &state.vcpus {
        // Of the kernel's structures only the length is checked here: the kernel checks the values.
        assert_eq!(crate::blob::Blob::of(&vcpu.regs.get()), vcpu.regs);
        assert_eq!(crate::blob::Blob::of(&vcpu.lapic.get()), vcpu.lapic);
    }
}

fn serial_port(saved: &SavedSerial) {
    let port = SerialPort::new(eventfd(), Console::new());
    if !port.restore(saved) {
        return;
    }
    let kept = port.save();
    let again = SerialPort::new(eventfd(), Console::new());
    assert!(again.restore(&kept));
    assert_eq!(again.save(), kept);
    port.type_in(&[7; 100]);
    for offset in 0..16 {
        port.read(offset);
        port.write(offset, offset.wrapping_mul(37));
    }
    port.reset();
    assert_eq!(
        port.save(),
        SerialPort::new(eventfd(), Console::new()).save()
    );
}

fn console(saved: &SavedConsole) {
    let mut console = Console::new();
    console.restore(saved);
    let kept = console.save();
    assert!(kept.recent.bytes().len() <= CONSOLE_HISTORY_BYTES);
    assert!(saved.recent.bytes().ends_with(kept.recent.bytes()));
    assert!(kept.position >= saved.position);
    console.write_all(b"more").unwrap();
    assert!(console.recent().ends_with(b"more"));
}

fn cmos_clock(saved: &SavedRtc) {
    let ram = RamSizes {
        low: 8 << 20,
        high: 0,
    };
    let new = || Rtc::new(Arc::new(SystemClock), ram);
    let (clock, again) = (new(), new());
    clock.restore(saved);
    let kept = clock.save();
    again.restore(&kept);
    assert_eq!(again.save(), kept);
    for index in 0..=255 {
        clock.select(index);
        let value = clock.read();
        clock.write(value.wrapping_add(index));
    }
    clock.reset();
    clock.select(0);
    clock.read();
}

fn panics(saved: PanicStatus) {
    let device = Pvpanic::new(Arc::new(|_| ()));
    device.restore(saved);
    assert_eq!(device.status(), saved);
    for events in 0..=4 {
        device.write(events);
    }
    assert!(device.status().count >= saved.count);
    device.reset();
    assert_eq!(device.status().present, None);
}

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

const INITRD_BYTE: u8 = 7;
/// Texts of so many bytes fit on every disk for cloud-init, whatever is in them: JSON has at most six for one of a key.
const CLOUD_INIT_FITS: usize = (1 << 20) / 6;
const HOUR_NS: u64 = 3_600_000_000_000;
