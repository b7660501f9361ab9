//! What the agent in a guest says of it, for the status of its VirtualMachine.

use bascule_crds::names::reason;
use bascule_crds::{GuestOsStatus, GuestStatus, InterfaceStatus, VirtualMachine, mac_address};
use bascule_ipc::vm::{GuestAgent, GuestInfo};
use bascule_operator_core::{Condition, Fact, Observed, RowView};

/// What becomes of the status.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum GuestReport {
    /// Nothing new is known: it stays.
    Unknown,
    /// The guest has no port for an agent, and is to have none.
    NoPort,
    /// The condition, and what the agent says if it answers.
    Known(Condition, Option<Box<GuestInfo>>),
}

/// The report on the guest of a VM that is to have a port for an agent or not (`wanted`). `is_new` says that the guest was
/// started since the last status: what was known of the one before is outdated.
pub(crate) fn guest_report(wanted: bool, observed: &Observed, is_new: bool) -> GuestReport {
    let row = match &observed.row {
        Fact::Known(row) => row,
        Fact::Unknown => return GuestReport::Unknown,
        Fact::Absent => return absent(wanted, reason::NOT_RUNNING, "the guest is off"),
    };
    let Some(agent) = own_agent(row, observed) else {
        return match row.owner {
            Some(_) if !is_new => GuestReport::Unknown,
            _ => absent(wanted, reason::NOT_RUNNING, "the guest is off"),
        };
    };
    let not_connected = |message| absent(true, reason::NOT_CONNECTED, message);
    match agent {
        None => {
            let message = "the guest was started without a port for an agent";
            absent(wanted, reason::NOT_CONNECTED, message)
        }
        Some(GuestAgent::Absent) => not_connected("no agent in the guest has opened its port"),
        // It has just come here, and is asked in this moment.
        Some(GuestAgent::Waiting) if !is_new => GuestReport::Unknown,
        Some(GuestAgent::Waiting) => not_connected("the agent in the guest has yet to answer"),
        Some(GuestAgent::Silent) => {
            let message = "the agent in the guest does not answer";
            absent(true, reason::NOT_RESPONDING, message)
        }
        Some(GuestAgent::Connected(info)) => {
            let connected = Condition::new(Some(true), reason::CONNECTED, "");
            // Again: the process that says this may have been taken over by its guest.
            GuestReport::Known(connected, Some(Box::new(info.as_ref().clone().bounded())))
        }
    }
}

fn absent(has_port: bool, reason: &'static str, message: &str) -> GuestReport {
    if !has_port {
        return GuestReport::NoPort;
    }
    GuestReport::Known(Condition::new(Some(false), reason, message), None)
}

/// What the process that runs the guest says of its agent; none without such a process.
fn own_agent<'a>(row: &RowView, observed: &'a Observed) -> Option<Option<&'a GuestAgent>> {
    let mut processes = observed.processes.iter();
    let own = processes.find(|process| process.alive && process.status.epoch == row.epoch)?;
    Some(own.status.guest_agent.as_ref())
}

impl GuestReport {
    /// `status.guest`, which was `old`.
    pub(crate) fn guest(&self, old: Option<GuestStatus>) -> Option<GuestStatus> {
        match self {
            Self::Unknown => old,
            Self::NoPort => None,
            Self::Known(_, info) => info.as_ref().map(|info| GuestStatus {
                host_name: info.host_name.clone(),
                os: GuestOsStatus {
                    id: info.os.id.clone(),
                    version: info.os.version.clone(),
                    pretty_name: info.os.pretty_name.clone(),
                    kernel: info.os.kernel.clone(),
                },
                agent_version: info.agent_version.clone(),
            }),
        }
    }

    /// `status.interfaces`, which was `old`.
    pub(crate) fn interfaces(
        &self,
        vm: &VirtualMachine,
        old: &[InterfaceStatus],
    ) -> Vec<InterfaceStatus> {
        let uid = vm.metadata.uid.as_deref().unwrap_or_default();
        let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let interfaces = vm.spec.interfaces.iter().map(|interface| {
            let name = interface.name.clone();
            let mac = interface.mac.clone();
            let mac = mac.unwrap_or_else(|| text(mac_address(uid, &name)));
            let addresses = match self {
                Self::Unknown => {
                    let old = old.iter().find(|old| old.name == name && old.mac == mac);
                    old.map(|old| old.addresses.clone()).unwrap_or_default()
                }
                Self::Known(_, Some(info)) => {
                    let mut told = info.interfaces.iter();
                    let own = told.find(|told| text(told.mac).eq_ignore_ascii_case(&mac));
                    let addresses = own.map(|own| own.addresses.as_slice()).unwrap_or_default();
                    addresses.iter().map(ToString::to_string).collect()
                }
                Self::Known(_, None) | Self::NoPort => Vec::new(),
            };
            InterfaceStatus {
                name,
                mac,
                addresses,
            }
        });
        interfaces.collect()
    }
}

#[cfg(test)]
mod tests {
    use bascule_ipc::vm::{GuestInterface, VmStatus};
    use bascule_operator_core::Process;
    use bascule_types::{Epoch, Generation, Owner, SlotId};
    use serde_json::json;

    use super::*;

    /// The guest runs, and its process says this of its agent.
    fn observed(agent: Option<&GuestAgent>) -> Observed {
        let owner = Owner {
            slot: SlotId(1),
            generation: Generation(1),
        };
        let status: VmStatus = serde_json::from_value(json!({
            "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e", "release": "1", "pid": 7, "state": "Running",
            "owner": owner, "epoch": Epoch(5), "listening": null, "migration": null, "io_stalled": false,
            "addresses": [], "guest_agent": agent,
        }))
        .unwrap();
        Observed {
            row: Fact::Known(RowView {
                owner: Some(owner),
                epoch: Epoch(5),
                ..RowView::default()
            }),
            processes: vec![Process {
                node: "n1".to_owned(),
                alive: true,
                status,
            }],
            ..Observed::default()
        }
    }

    fn reason_of(wanted: bool, observed: &Observed, is_new: bool) -> Option<&'static str> {
        match guest_report(wanted, observed, is_new) {
            GuestReport::Known(condition, info) => {
                assert_eq!(condition.status == Some(true), info.is_some());
                Some(condition.reason)
            }
            GuestReport::NoPort => None,
            GuestReport::Unknown => Some("unknown"),
        }
    }

    fn connected() -> GuestAgent {
        GuestAgent::Connected(Box::new(GuestInfo {
            host_name: "web\u{1B}[2J".to_owned(),
            interfaces: vec![GuestInterface {
                mac: [2, 0, 0, 0, 0, 10],
                addresses: vec!["10.0.0.5".parse().unwrap()],
            }],
            ..GuestInfo::default()
        }))
    }

    #[test]
    fn only_an_agent_that_answers_is_shown_as_connected() {
        let of = |agent: &GuestAgent| reason_of(true, &observed(Some(agent)), true);
        assert_eq!(of(&connected()), Some("Connected"));
        assert_eq!(of(&GuestAgent::Absent), Some("NotConnected"));
        assert_eq!(of(&GuestAgent::Waiting), Some("NotConnected"));
        assert_eq!(of(&GuestAgent::Silent), Some("NotResponding"));
        assert_eq!(
            reason_of(true, &observed(None), false),
            Some("NotConnected")
        );
        assert_eq!(reason_of(false, &observed(None), false), None);
    }

    /// After a migration, the destination's process has yet to ask; an unreachable node says nothing.
    #[test]
    fn what_is_known_stays_while_a_guest_moves_and_not_over_a_new_start() {
        let waiting = observed(Some(&GuestAgent::Waiting));
        assert_eq!(reason_of(true, &waiting, false), Some("unknown"));
        let mut moving = waiting;
        moving.processes.clear();
        assert_eq!(reason_of(true, &moving, false), Some("unknown"));
        assert_eq!(reason_of(true, &moving, true), Some("NotRunning"));
        moving.row = Fact::Unknown;
        assert_eq!(reason_of(true, &moving, false), Some("unknown"));
        moving.row = Fact::Known(RowView::default());
        assert_eq!(reason_of(true, &moving, false), Some("NotRunning"));
        assert_eq!(reason_of(false, &moving, false), None);
    }

    #[test]
    fn addresses_are_those_of_the_interface_with_the_same_mac() {
        let vm: VirtualMachine = serde_json::from_value(json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {"name": "web", "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e"},
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
                "interfaces": [
                    {"name": "lan", "bridge": "lan", "mac": "02:00:00:00:00:0A"},
                    {"name": "san", "bridge": "san"},
                ],
            },
        }))
        .unwrap();
        let report = guest_report(true, &observed(Some(&connected())), false);
        let shown = report.interfaces(&vm, &[]);
        assert_eq!(shown[0].addresses, ["10.0.0.5"]);
        assert_eq!(shown[1].addresses, Vec::<String>::new());
        assert_eq!(report.guest(None).unwrap().host_name, "web[2J");
        // Nothing new is known; the agent is silent.
        assert_eq!(GuestReport::Unknown.interfaces(&vm, &shown), shown);
        let silent = guest_report(true, &observed(Some(&GuestAgent::Silent)), false);
        assert!(silent.interfaces(&vm, &shown)[0].addresses.is_empty());
        assert_eq!(silent.guest(report.guest(None)), None);
    }
}
