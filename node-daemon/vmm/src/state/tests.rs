use bascule_ipc::vm::Panic;
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};

use super::*;

/// A state with a recognizable value in every part.
fn sample() -> MachineState {
    let mut lapic = kvm_lapic_state::default();
    lapic.regs[0x20] = 3;
    let mut xsave = vec![0; 4096];
    xsave[24] = 0x1F;
    let regs = kvm_regs {
        rip: 0x10_0000,
        rflags: 2,
        ..Default::default()
    };
    let sregs = kvm_sregs {
        cr0: 0x11,
        cr3: 0x9000,
        ..Default::default()
    };
    let vcpu = VcpuState {
        cpuid: vec![Blob::of(&kvm_cpuid_entry2 {
            function: 1,
            eax: 2,
            ..Default::default()
        })],
        mp_state: Blob::of(&kvm_mp_state { mp_state: 3 }),
        regs: Blob::of(&regs),
        sregs: Blob::of(&sregs),
        xsave: Blob::of_bytes(&xsave),
        xcrs: Some(Blob::of(&kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        })),
        debugregs: Blob::of(&kvm_debugregs {
            dr7: 0x400,
            ..Default::default()
        }),
        lapic: Blob::of(&lapic),
        msrs: vec![(0x10, 123_456_789_012), (0xC000_0080, 0x500)],
        events: Blob::of(&kvm_vcpu_events {
            flags: 4,
            ..Default::default()
        }),
        tsc_khz: Some(2_600_000),
        tsc_offset: Some(u64::MAX - 41),
    };
    let chip = |chip_id| {
        Blob::of(&kvm_irqchip {
            chip_id,
            ..Default::default()
        })
    };
    MachineState {
        version: 1,
        memory: Bytes::mib(512),
        vcpus: vec![vcpu],
        irqchips: vec![chip(0), chip(1), chip(2)],
        pit: Some(Blob::of(&kvm_pit_state2 {
            flags: 1,
            ..Default::default()
        })),
        clock: Blob::of(&kvm_clock_data {
            clock: 77,
            ..Default::default()
        }),
        serial: SavedSerial::default(),
        power_events: 1,
        devices: DeviceState::new("pci", 1, &["nothing"]),
        resets: 0,
        pm_timer_ns: None,
        rtc: None,
        console: None,
        panics: PanicStatus::default(),
    }
}

/// The bytes of version 1 must never change: running guests are moved between releases.
#[test]
fn version_1_is_written_and_read_as_it_always_was() {
    let golden = include_bytes!("golden-v1.json");
    assert_eq!(sample().encode().unwrap(), golden);
    assert_eq!(MachineState::decode(golden).unwrap(), sample());
}

#[test]
fn the_number_of_resets_is_kept_and_absent_in_a_state_without() {
    let state = MachineState {
        resets: 3,
        ..sample()
    };
    let text = state.encode().unwrap();
    assert_eq!(MachineState::decode(&text).unwrap(), state);
}

#[test]
fn the_age_of_the_power_management_timer_is_kept_and_absent_in_a_state_without() {
    let state = MachineState {
        pm_timer_ns: Some(u64::MAX),
        ..sample()
    };
    let text = state.encode().unwrap();
    assert_eq!(MachineState::decode(&text).unwrap(), state);
    assert_eq!(sample().pm_timer_ns, None);
}

/// As [`version_1_is_written_and_read_as_it_always_was`], of the parts that came later.
#[test]
fn the_cmos_clock_is_written_and_read_as_it_always_was() {
    let state = MachineState {
        rtc: Some(crate::rtc::saved()),
        ..sample()
    };
    let text = String::from_utf8(state.encode().unwrap()).unwrap();
    let bytes = "BwcH".repeat(42) + "Bwc=";
    let golden = format!(r#","rtc":{{"index":9,"ahead_us":-3600000000,"bytes":"{bytes}"}}}}"#);
    assert!(text.ends_with(&golden), "{text}");
    assert_eq!(MachineState::decode(text.as_bytes()).unwrap(), state);
}

/// As [`version_1_is_written_and_read_as_it_always_was`], of the parts that came later.
#[test]
fn the_serial_output_is_written_and_read_as_it_always_was() {
    let state = MachineState {
        console: Some(SavedConsole {
            position: 1_000_000,
            recent: Blob::of_bytes(b"login: "),
        }),
        ..sample()
    };
    let text = String::from_utf8(state.encode().unwrap()).unwrap();
    let golden = r#","console":{"position":1000000,"recent":"bG9naW46IA=="}}"#;
    assert!(text.ends_with(golden), "{text}");
    assert_eq!(MachineState::decode(text.as_bytes()).unwrap(), state);
}

/// As [`version_1_is_written_and_read_as_it_always_was`], of the parts that came later.
#[test]
fn the_panics_are_written_and_read_as_they_always_were() {
    for (count, present, text) in [
        (1, Some(Panic::Panicked), r#"1,"present":"Panicked""#),
        (2, Some(Panic::CrashLoaded), r#"2,"present":"CrashLoaded""#),
        (3, None, r#"3,"present":null"#),
    ] {
        let state = MachineState {
            panics: PanicStatus { count, present },
            ..sample()
        };
        let written = String::from_utf8(state.encode().unwrap()).unwrap();
        let golden = format!(r#","panics":{{"count":{text}}}}}"#);
        assert!(written.ends_with(&golden), "{written}");
        assert_eq!(MachineState::decode(written.as_bytes()).unwrap(), state);
    }
}

#[test]
fn a_field_of_a_later_release_is_ignored() {
    let text = String::from_utf8(sample().encode().unwrap()).unwrap();
    let later = text.replacen('{', "{\"mood\":\"new\",", 1);
    assert_eq!(MachineState::decode(later.as_bytes()).unwrap(), sample());
}

#[test]
fn a_truncated_state_is_refused() {
    let whole = sample().encode().unwrap();
    for length in (0..whole.len()).step_by(97) {
        assert!(
            MachineState::decode(&whole[..length]).is_err(),
            "{length} bytes"
        );
    }
}
