//! Which VirtualMachines have the same MAC address on one network: an index that follows the watch of
//! VirtualMachines, so that asking about one of them takes no look at all the others.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use bascule_crds::VirtualMachine;
use bascule_crds::names::{condition, reason};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use kube::runtime::watcher::Event;

use crate::kube_api::new_condition;

/// Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct MacIndex {
    claims: Arc<Mutex<Claims>>,
}

/// A network by its name in the administrator's allow-list, and an address on it.
type Address = (String, [u8; 6]);

/// Namespace and name.
type VmName = (String, String);

#[derive(Debug, Default)]
struct Claims {
    by_vm: HashMap<VmName, Vec<Address>>,
    by_address: HashMap<Address, BTreeSet<VmName>>,
    /// Who has been listed so far, while the watch begins anew.
    listed: Option<HashSet<VmName>>,
}

impl MacIndex {
    /// Follows the watch.
    pub(crate) fn apply(&self, event: &Event<VirtualMachine>) {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Apply(vm) => claims.put(vm),
            Event::Delete(vm) => claims.remove(&name_of(vm)),
            Event::Init => claims.listed = Some(HashSet::new()),
            Event::InitApply(vm) => {
                claims.put(vm);
                if let Some(listed) = &mut claims.listed {
                    listed.insert(name_of(vm));
                }
            }
            Event::InitDone => {
                let listed = claims.listed.take().unwrap_or_default();
                let all: Vec<VmName> = claims.by_vm.keys().cloned().collect();
                for vm in all.iter().filter(|vm| !listed.contains(*vm)) {
                    claims.remove(vm);
                }
            }
        }
    }

    /// The condition that tells a VM's author of every address that another VM has on the same
    /// network; none when there is no such address.
    pub(crate) fn conflict(&self, vm: &VirtualMachine, now: Timestamp) -> Option<Condition> {
        let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let me = name_of(vm);
        let uid = vm.metadata.uid.as_deref();
        let mut complaints = vec![];
        for (index, interface) in vm.spec.interfaces.iter().enumerate() {
            let Some(mac) = interface.effective_mac(uid) else {
                continue;
            };
            let holders = claims.by_address.get(&(interface.bridge.clone(), mac));
            let others = holders.into_iter().flatten().filter(|other| **other != me);
            let others: Vec<String> = others.take(NAMES_MAX).map(|vm| shown(vm, &me)).collect();
            if !others.is_empty() {
                complaints.push(format!(
                    "spec.interfaces[{index}].mac: {} on network {} is also that of {}",
                    mac.map(|byte| format!("{byte:02x}")).join(":"),
                    interface.bridge,
                    others.join(", ")
                ));
            }
        }
        if complaints.is_empty() {
            return None;
        }
        let message = format!(
            "{}: give each virtual machine its own, or leave mac out",
            complaints.join("; ")
        );
        let mut condition = new_condition(
            condition::MAC_CONFLICT,
            "True",
            reason::DUPLICATE_MAC,
            &message,
            now,
        );
        condition.observed_generation = vm.metadata.generation;
        Some(condition)
    }
}

impl Claims {
    fn put(&mut self, vm: &VirtualMachine) {
        let name = name_of(vm);
        self.remove(&name);
        let uid = vm.metadata.uid.as_deref();
        let interfaces = vm.spec.interfaces.iter();
        let addresses: Vec<Address> = interfaces
            .filter_map(|i| Some((i.bridge.clone(), i.effective_mac(uid)?)))
            .collect();
        for address in &addresses {
            let holders = self.by_address.entry(address.clone()).or_default();
            holders.insert(name.clone());
        }
        self.by_vm.insert(name, addresses);
    }

    fn remove(&mut self, vm: &VmName) {
        for address in self.by_vm.remove(vm).unwrap_or_default() {
            if let Some(holders) = self.by_address.get_mut(&address) {
                holders.remove(vm);
                if holders.is_empty() {
                    self.by_address.remove(&address);
                }
            }
        }
    }
}

/// Whether the VM's status does not tell it yet.
pub(crate) fn is_news(vm: &VirtualMachine, conflict: &Condition) -> bool {
    let told = vm.status.iter().flat_map(|status| &status.conditions);
    !told
        .filter(|old| old.type_ == conflict.type_)
        .any(|old| old.message == conflict.message)
}

/// Puts the condition among the others, or takes it from them when there is no conflict any more.
pub(crate) fn set(conditions: &mut Vec<Condition>, conflict: Option<Condition>) {
    match conflict {
        Some(conflict) => bascule_crds::set_condition(conditions, conflict),
        None => conditions.retain(|old| old.type_ != condition::MAC_CONFLICT),
    }
}

/// Another tenant's virtual machines are not named.
fn shown(other: &VmName, me: &VmName) -> String {
    if other.0 == me.0 {
        other.1.clone()
    } else {
        "a virtual machine of another namespace".to_owned()
    }
}

fn name_of(vm: &VirtualMachine) -> VmName {
    (vm.namespace().unwrap_or_default(), vm.name_any())
}

/// Of the VMs with the same address, how many are named.
const NAMES_MAX: usize = 3;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vm(namespace: &str, name: &str, bridge: &str, mac: Option<&str>) -> VirtualMachine {
        let mut interface = json!({"name": "lan", "bridge": bridge});
        if let Some(mac) = mac {
            interface["mac"] = json!(mac);
        }
        serde_json::from_value(json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {"namespace": namespace, "name": name, "uid": format!("{namespace}-{name}")},
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
                "interfaces": [interface],
            },
        }))
        .unwrap()
    }

    fn message(index: &MacIndex, vm: &VirtualMachine) -> Option<String> {
        let condition = index.conflict(vm, Timestamp::UNIX_EPOCH)?;
        assert_eq!(
            (condition.type_.as_str(), condition.status.as_str()),
            ("MacConflict", "True")
        );
        Some(condition.message)
    }

    const MAC: Option<&str> = Some("02:00:00:00:00:0a");

    #[test]
    fn both_virtual_machines_are_told_until_one_changes_or_goes() {
        let index = MacIndex::default();
        let (a, b) = (vm("shop", "a", "lan", MAC), vm("shop", "b", "lan", MAC));
        index.apply(&Event::Apply(a.clone()));
        assert_eq!(message(&index, &a), None, "alone");
        index.apply(&Event::Apply(b.clone()));
        for (one, other) in [(&a, "b"), (&b, "a")] {
            let told = message(&index, one).unwrap();
            let words = format!(
                "spec.interfaces[0].mac: 02:00:00:00:00:0a on network lan is also that of {other}: "
            );
            assert!(told.starts_with(&words), "{told}");
        }
        let changed = vm("shop", "b", "lan", Some("02:00:00:00:00:0b"));
        index.apply(&Event::Apply(changed.clone()));
        assert_eq!(
            (message(&index, &a), message(&index, &changed)),
            (None, None)
        );
        index.apply(&Event::Apply(b.clone()));
        assert!(message(&index, &a).is_some());
        index.apply(&Event::Delete(b));
        assert_eq!(message(&index, &a), None);
    }

    #[test]
    fn the_condition_is_news_once_and_goes_with_the_conflict() {
        let index = MacIndex::default();
        let (mut a, b) = (vm("shop", "a", "lan", MAC), vm("shop", "b", "lan", MAC));
        index.apply(&Event::Apply(a.clone()));
        index.apply(&Event::Apply(b));
        let conflict = index.conflict(&a, Timestamp::UNIX_EPOCH).unwrap();
        assert!(is_news(&a, &conflict));
        let mut status = bascule_crds::VirtualMachineStatus::default();
        set(&mut status.conditions, Some(conflict.clone()));
        assert_eq!(status.conditions, std::slice::from_ref(&conflict));
        a.status = Some(status.clone());
        assert!(!is_news(&a, &conflict), "one event for each conflict");
        set(&mut status.conditions, None);
        assert_eq!(status.conditions, []);
    }

    #[test]
    fn the_same_address_on_another_network_is_none_of_its_business() {
        let index = MacIndex::default();
        let (a, b) = (vm("shop", "a", "lan", MAC), vm("shop", "b", "wan", MAC));
        index.apply(&Event::Apply(a.clone()));
        index.apply(&Event::Apply(b.clone()));
        assert_eq!((message(&index, &a), message(&index, &b)), (None, None));
    }

    #[test]
    fn another_tenants_virtual_machine_counts_and_is_not_named() {
        let index = MacIndex::default();
        let (a, b) = (vm("shop", "a", "lan", MAC), vm("bank", "vault", "lan", MAC));
        index.apply(&Event::Apply(a.clone()));
        index.apply(&Event::Apply(b));
        let told = message(&index, &a).unwrap();
        assert!(told.contains("of another namespace"), "{told}");
        assert!(!told.contains("vault") && !told.contains("bank"), "{told}");
    }

    #[test]
    fn an_address_that_another_was_given_by_default_counts() {
        let index = MacIndex::default();
        let a = vm("shop", "a", "lan", None);
        let given = bascule_crds::mac_address("shop-a", "lan");
        let text = given.map(|byte| format!("{byte:02x}")).join(":");
        let b = vm("shop", "b", "lan", Some(&text));
        index.apply(&Event::Apply(a.clone()));
        index.apply(&Event::Apply(b));
        assert!(message(&index, &a).is_some());
    }

    #[test]
    fn a_watch_that_begins_anew_forgets_those_that_went_meanwhile() {
        let index = MacIndex::default();
        let (a, b) = (vm("shop", "a", "lan", MAC), vm("shop", "b", "lan", MAC));
        index.apply(&Event::Apply(a.clone()));
        index.apply(&Event::Apply(b));
        index.apply(&Event::Init);
        index.apply(&Event::InitApply(a.clone()));
        assert!(
            message(&index, &a).is_some(),
            "the list is not complete yet"
        );
        index.apply(&Event::InitDone);
        assert_eq!(message(&index, &a), None);
    }
}
