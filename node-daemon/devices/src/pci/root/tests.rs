use super::*;
use crate::device::Device;
use crate::pci::{ConfigSpace, ConfigState, Identity};
use crate::rng::{RngConfig, RngDevice};
use crate::testing::TestMachine;

/// A function with one BAR, backed by a register of 8 bytes.
struct Scratch {
    config: ConfigSpace,
    register: [u8; 8],
    writer_state: WriterState,
}

impl Scratch {
    fn new() -> Self {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1AF4,
            device: 1,
            revision: 0,
            class: [0xFF, 0, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.add_memory_bar(0, 0x1000);
        Self {
            config,
            register: [0; 8],
            writer_state: WriterState::Clean,
        }
    }
}

impl Device for Scratch {
    fn name(&self) -> &'static str {
        "scratch"
    }
    fn pause(&mut self) -> WriterState {
        self.writer_state
    }
    fn resume(&mut self) {}
    fn save(&self) -> DeviceState {
        DeviceState::new("scratch", 1, &self.config.save())
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let state: ConfigState = state.parse("scratch", "scratch", 1)?;
        let restored = self.config.restore(&state);
        restored.map_err(|reason| RestoreError::DoesNotFit {
            device: "scratch".to_owned(),
            reason,
        })
    }
    fn reset(&mut self) {
        self.register = [0; 8];
    }
}

impl PciFunction for Scratch {
    fn config_read(&mut self, register: u16, data: &mut [u8]) {
        self.config.read(register, data);
    }
    fn config_write(&mut self, register: u16, data: &[u8]) {
        self.config.write(register, data);
    }
    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        self.config.bar_sizes()
    }
    fn place_bar(&mut self, bar: usize, start: GuestAddress) {
        self.config.place_bar(bar, start);
    }
    fn bars(&self) -> Vec<BarRegion> {
        self.config.bars()
    }
    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        for (at, byte) in (usize::try_from(offset).unwrap()..).zip(data) {
            *byte = self.register.get(at).copied().unwrap_or(0);
        }
    }
    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        for (at, byte) in (usize::try_from(offset).unwrap()..).zip(data) {
            if let Some(own) = self.register.get_mut(at) {
                *own = *byte;
            }
        }
    }
}

fn root() -> PciRoot {
    let mut root = PciRoot::new(GuestAddress(0xC000_0000)..GuestAddress(0xF000_0000));
    assert_eq!(root.add(Box::new(Scratch::new())).unwrap(), DeviceNumber(1));
    assert_eq!(root.add(Box::new(Scratch::new())).unwrap(), DeviceNumber(2));
    root
}

fn config_dword(root: &PciRoot, device: u64, register: u64) -> u32 {
    let mut data = [0; 4];
    root.ecam_read((device << 15) | register, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn ecam_and_ports_find_the_same_functions() {
    let root = root();
    assert_eq!(config_dword(&root, 0, 0), 0x0D57_8086);
    assert_eq!(config_dword(&root, 1, 0), 0x0001_1AF4);
    assert_eq!(config_dword(&root, 3, 0), 0xFFFF_FFFF, "an empty slot");
    assert_eq!(config_dword(&root, 1, 0x100), 0, "no extended capabilities");

    root.io_write(0xCF8, &(0x8000_0000_u32 | (1 << 11)).to_le_bytes());
    let mut data = [0; 2];
    root.io_read(0xCFE, &mut data);
    assert_eq!(u16::from_le_bytes(data), 1, "the device id");
    let mut latch = [0; 4];
    root.io_read(0xCF8, &mut latch);
    assert_eq!(u32::from_le_bytes(latch), 0x8000_0800);
}

#[test]
fn assigned_bars_decode_without_any_set_up_and_follow_the_guest() {
    let root = root();
    assert!(root.mmio_write(GuestAddress(0xC000_1000), &[7]));
    assert!(root.mmio_write(GuestAddress(0xC000_0000), &[5]));
    let mut byte = [0];
    assert!(root.mmio_read(GuestAddress(0xC000_1000), &mut byte));
    assert_eq!(byte, [7], "device 2 has its own register");
    assert!(
        !root.mmio_read(GuestAddress(0xC000_2000), &mut byte),
        "beyond all BARs"
    );
    assert!(
        !root.mmio_read(GuestAddress(0xC000_1FFF), &mut [0; 2]),
        "across the end"
    );

    root.ecam_write((2 << 15) | 0x10, &0xE000_0000_u32.to_le_bytes());
    assert!(!root.mmio_read(GuestAddress(0xC000_1000), &mut byte));
    assert!(root.mmio_read(GuestAddress(0xE000_0000), &mut byte));
    assert_eq!(byte, [7]);

    root.ecam_write((2 << 15) | 4, &[0, 0]);
    assert!(
        !root.mmio_read(GuestAddress(0xE000_0000), &mut byte),
        "decoding is off"
    );
}

#[test]
fn a_restored_bus_decodes_where_the_saved_one_did() {
    let source = root();
    source.ecam_write((1 << 15) | 0x10, &0xD000_0000_u32.to_le_bytes());
    source.io_write(0xCF8, &0x8000_1234_u32.to_le_bytes());
    let saved = source.save();

    let destination = root();
    destination.restore(&saved).unwrap();
    assert!(destination.mmio_read(GuestAddress(0xD000_0000), &mut [0]));
    assert!(!destination.mmio_read(GuestAddress(0xC000_0000), &mut [0]));
    assert_eq!(destination.save(), saved);
}

#[test]
fn a_bus_with_other_devices_refuses_the_state() {
    let saved = root().save();
    let smaller = PciRoot::new(GuestAddress(0xC000_0000)..GuestAddress(0xF000_0000));
    let error = smaller.restore(&saved).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the source has 3 functions, this bus 1"),
        "{error}"
    );
}

#[test]
fn a_full_window_names_the_device() {
    let mut root = PciRoot::new(GuestAddress(0xC000_0000)..GuestAddress(0xC000_1000));
    root.add(Box::new(Scratch::new())).unwrap();
    let error = root.add(Box::new(Scratch::new())).unwrap_err();
    assert!(error.to_string().contains("scratch"), "{error}");
}

#[test]
fn a_paused_bus_is_clean_only_if_every_device_is() {
    let mut root = root();
    assert_eq!(root.pause(), WriterState::Clean);
    root.add(Box::new(Scratch {
        writer_state: WriterState::Unclean,
        ..Scratch::new()
    }))
    .unwrap();
    root.add(Box::new(Scratch::new())).unwrap();
    assert_eq!(root.pause(), WriterState::Unclean);
}

#[test]
fn a_bus_after_a_reset_is_as_it_was_made() {
    let machine = TestMachine::new();
    let mut root = PciRoot::new(GuestAddress(0xC000_0000)..GuestAddress(0xF000_0000));
    for name in ["rng0", "rng1"] {
        let config = RngConfig { name: name.into() };
        let device = RngDevice::new(&config, machine.context()).unwrap();
        root.add(Box::new(device.function)).unwrap();
    }
    assert_eq!(root.pause(), WriterState::Clean);
    let fresh = root.save();
    root.resume();
    root.io_write(0xCF8, &0x8000_1234_u32.to_le_bytes());
    for device in 0..3_u64 {
        root.ecam_write((device << 15) | 0x3C, &[9]);
        root.ecam_write((device << 15) | 0x10, &0xE000_0000_u32.to_le_bytes());
    }
    root.ecam_write((2 << 15) | 4, &[0, 0]);
    assert!(!root.mmio_read(GuestAddress(0xC000_0000), &mut [0]));
    assert_eq!(root.pause(), WriterState::Clean);
    assert_ne!(root.save(), fresh);
    root.reset();
    assert_eq!(root.save(), fresh);
    assert!(root.mmio_read(GuestAddress(0xC000_0000), &mut [0]));
    assert!(!root.mmio_read(GuestAddress(0xE000_0000), &mut [0]));
}
