//! The agent of the probe guest, behind its port: heard, moved and told to shut down.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bascule_e2e::{GUEST, MovableGuest, TwoNodes, kvm_or_skip};
use bascule_ipc::vm::{GuestAgent, Request, StopReason};

const SOON: Duration = Duration::from_secs(60);

/// Two nodes with the VM `vm`, whose guest has a port for its agent.
fn lab(options: &str) -> TwoNodes {
    let mut lab = TwoNodes::new(&format!("tick_ms=5 {options}")).unwrap();
    lab.vm = lab.vm.configured(|config| config.guest_agent = true);
    lab
}

fn hear(guest: &mut MovableGuest) {
    let info = guest.vm.wait_agent(SOON).unwrap();
    assert_eq!(
        (info.host_name.as_str(), info.os.id.as_str()),
        ("probe", "probe")
    );
    assert_eq!(info.interfaces.len(), 1);
    assert_eq!(info.interfaces[0].addresses, [std::net::IpAddr::V4(GUEST)]);
}

#[test]
fn an_agent_is_heard_wherever_its_guest_moves_and_shuts_it_down() {
    if !kvm_or_skip("an_agent_is_heard_wherever_its_guest_moves_and_shuts_it_down") {
        return;
    }
    let lab = lab("fill=32M");
    let mut guest = lab.boot(&lab.vm).unwrap();
    hear(&mut guest);

    // Its port is open at the destination, without a new word of the guest.
    lab.migrate(&mut guest).unwrap();
    hear(&mut guest);

    // Out of the volume, where it does not know how long it was.
    lab.save(&mut guest, Some(lab.nodes[0].owner().unwrap()))
        .unwrap();
    guest.vm.exit(SOON).unwrap();
    lab.restore(&mut guest, 0, lab.epoch().unwrap()).unwrap();
    let before = std::time::SystemTime::now();
    let told = guest.console.wait_line("agent set-time ", SOON).unwrap();
    let told: u64 = told.rsplit(' ').next().unwrap().parse().unwrap();
    let told = std::time::UNIX_EPOCH + Duration::from_nanos(told);
    assert!(told + SOON > before && told < std::time::SystemTime::now());
    hear(&mut guest);
    guest.check().unwrap();

    guest.vm.must(&Request::PowerButton).unwrap();
    guest.console.wait_line("agent shutdown", SOON).unwrap();
    let reason = guest.vm.wait_stopped(SOON).unwrap();
    assert_eq!(reason, StopReason::GuestShutdown);
    assert_eq!(
        guest.vm.status().unwrap().guest_agent,
        Some(GuestAgent::Absent)
    );
}

#[test]
fn a_guest_whose_agent_has_not_opened_its_port_gets_the_power_button_at_once() {
    if !kvm_or_skip("a_guest_whose_agent_has_not_opened_its_port_gets_the_power_button_at_once") {
        return;
    }
    let lab = lab("agent=0");
    let mut guest = lab.boot(&lab.vm).unwrap();
    lab.migrate(&mut guest).unwrap();
    assert_eq!(
        guest.vm.status().unwrap().guest_agent,
        Some(GuestAgent::Absent)
    );
    guest.vm.must(&Request::PowerButton).unwrap();
    guest.console.wait_line("power button", SOON).unwrap();
    assert_eq!(
        guest.vm.wait_stopped(SOON).unwrap(),
        StopReason::GuestShutdown
    );
}
