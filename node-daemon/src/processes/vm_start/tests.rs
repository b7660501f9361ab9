//! Starts that fail at every step, on a node that is only a set of names.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use anyhow::anyhow;
use bascule_node_api::cloud_init::CloudInitSecrets;
use bascule_node_api::command::Interface;
use bascule_types::{Bytes, Epoch};

use super::*;
use crate::processes::tap::tests::{Network, ip};

/// When a step fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fails {
    /// Before it has had any effect.
    Without,
    /// After it has had its effect.
    With,
}

/// What is on the node; the step number `fails_at` fails.
struct FakeNode {
    present: RefCell<BTreeSet<String>>,
    undone: RefCell<Vec<String>>,
    steps: Cell<usize>,
    fails_at: Option<(usize, Fails)>,
}

impl FakeNode {
    fn new(fails_at: Option<(usize, Fails)>) -> Self {
        Self {
            present: RefCell::default(),
            undone: RefCell::default(),
            steps: Cell::new(0),
            fails_at,
        }
    }

    fn step(&self, makes: &str) -> Result<()> {
        let number = self.steps.replace(self.steps.get() + 1);
        let fails = self
            .fails_at
            .and_then(|(at, how)| (at == number).then_some(how));
        if fails != Some(Fails::Without) {
            self.present.borrow_mut().insert(makes.to_owned());
        }
        match fails {
            None => Ok(()),
            Some(_) => Err(anyhow!("step {number} fails")),
        }
    }

    fn undo(&self, made: &str) -> Result<()> {
        self.present.borrow_mut().remove(made);
        self.undone.borrow_mut().push(made.to_owned());
        Ok(())
    }
}

impl StartEffects for FakeNode {
    fn make_folder(&self) -> Result<()> {
        self.step("folder")
    }

    fn remove_folder(&self) -> Result<()> {
        self.present.borrow_mut().retain(|name| name != "documents");
        self.undo("folder")
    }

    fn make_tap(&self, tap: &WantedTap) -> Result<u16> {
        self.step(&tap.tap).map(|()| 9000)
    }

    fn remove_tap(&self, tap: &WantedTap) -> Result<()> {
        self.undo(&tap.tap)
    }

    fn write_documents(&self, interfaces: Vec<InterfaceConfig>) -> Result<()> {
        let told = interfaces.iter().all(|nic| nic.mtu == Some(9000));
        assert!(told, "{interfaces:?}");
        self.step("documents")
    }

    fn spawn(&self) -> Result<u32> {
        self.step("process").map(|()| 7)
    }
}

fn taps() -> Vec<WantedTap> {
    let tap = |tap: &str| WantedTap {
        tap: tap.to_owned(),
        bridge: format!("br-{tap}"),
        mac: [2; 6],
    };
    vec![tap("tap-0"), tap("tap-1")]
}

/// The first tap of a VM whose second bridge was missing stayed for ever.
#[test]
fn nothing_stays_after_a_start_that_failed_at_any_step() {
    let whole = FakeNode::new(None);
    start(&whole, &taps()).unwrap();
    let all = ["documents", "folder", "process", "tap-0", "tap-1"];
    let present: Vec<String> = whole.present.borrow().iter().cloned().collect();
    assert_eq!(present, all);
    assert!(whole.undone.borrow().is_empty());
    let steps = whole.steps.get();
    assert_eq!(steps, 5, "folder, two taps, documents, process");
    for at in 0..steps {
        for how in [Fails::Without, Fails::With] {
            if (at, how) == (4, Fails::With) {
                continue; // A process that is there is a step that has succeeded.
            }
            let node = FakeNode::new(Some((at, how)));
            let error = start(&node, &taps()).unwrap_err();
            assert!(error.message.contains("fails"), "{error}");
            let left = node.present.borrow();
            assert!(
                left.is_empty(),
                "step {at} failed ({how:?}), left: {left:?}"
            );
        }
    }
}

#[test]
fn a_failed_start_is_undone_in_reverse_order() {
    let node = FakeNode::new(Some((4, Fails::Without)));
    start(&node, &taps()).unwrap_err();
    let order = ["tap-1", "tap-0", "folder"];
    assert_eq!(*node.undone.borrow(), order);
}

#[test]
fn a_missing_bridge_is_named_with_its_field() {
    let node = FakeNode::new(Some((2, Fails::Without)));
    let error = start(&node, &taps()).unwrap_err();
    assert_eq!(error.reason, RejectReason::BridgeUnavailable);
    assert_eq!(
        error.message,
        "interfaces[1].bridge: bridge br-tap-1: step 2 fails"
    );
}

/// The same on real interfaces.
#[test]
fn of_a_vm_whose_second_bridge_is_missing_no_tap_and_no_file_stays() {
    let Some(_network) = Network::enter("bsc-start") else {
        return;
    };
    Network::bridge("br0", 9000);
    let folder = tempfile::tempdir().unwrap();
    let mut node = Supervisor::test(folder.path());
    let bridges = [("lan", "br0"), ("wan", "br9")];
    node.bridges = bridges.map(|(a, b)| (a.into(), b.into())).into();
    let interface = |network: &str| Interface {
        network: network.to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
    };
    let spec = VmSpec {
        uid: VmUid::from_bytes([1; 16]),
        namespace: "shop".into(),
        name: "web".into(),
        volume: "gold".into(),
        cpus: 1,
        memory: Bytes::mib(64),
        kernel: Some("shop/web.kernel".into()),
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
        interfaces: vec![interface("lan"), interface("wan")],
        shutdown_timeout_ms: None,
        cloud_init: None,
        guest_agent: false,
        on_panic: bascule_types::OnPanic::default(),
        cloud_init_secrets: CloudInitSecrets::default(),
    };
    let owner = bascule_types::Owner {
        slot: bascule_types::SlotId(1),
        generation: bascule_types::Generation(1),
    };
    let names = || -> Vec<String> {
        let links = ip("-o link show");
        let names = links.lines().filter_map(|line| line.split(' ').nth(1));
        names.map(str::to_owned).collect()
    };
    let before = names();
    let taps = node.wanted_taps(&spec).unwrap();
    let on_node = OnNode {
        node: &node,
        spec: &spec,
        ownership: Ownership::new(owner, Epoch(1)),
        mode: StartMode::Boot,
    };
    let error = start(&on_node, &taps).unwrap_err();
    assert_eq!(
        error.message,
        "interfaces[1].bridge: bridge br9: it does not exist on this node"
    );
    assert_eq!(names(), before);
    assert!(!node.paths.vm(spec.uid).exists());
}

/// A crash of the daemon in the middle of a start left its directory, and a crash in the middle of a
/// removal left the renamed one.
#[test]
fn what_an_interrupted_start_or_removal_left_is_removed_and_a_recorded_process_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let node = Supervisor::test(folder.path());
    let vm = |byte| VmUid::from_bytes([byte; 16]);
    let [begun, recorded, locked] = [vm(1), vm(2), vm(3)];
    for uid in [begun, recorded, locked] {
        fs::create_dir(node.paths.vm(uid)).unwrap();
        fs::write(node.paths.vm(uid).join("spec.json"), "{}").unwrap();
    }
    fs::write(node.paths.vm(recorded).join("pid"), "4194305").unwrap();
    let trash = node.paths.vms().join(format!("{}.gone", vm(4)));
    fs::create_dir(&trash).unwrap();
    let lock = node.try_vm_lock(locked).unwrap().unwrap();
    node.remove_interrupted_starts().unwrap();
    let exists = |uid| node.paths.vm(uid).exists();
    assert!(!exists(begun) && !trash.exists());
    assert!(exists(recorded), "the operator reads how it ended");
    assert!(exists(locked), "another command starts it");
    drop(lock);
    // A process that another test is starting may hold a copy of the lock until it is executed.
    let removed = wait_for(START_LIMIT, || {
        node.remove_interrupted_starts().unwrap();
        (!exists(locked)).then_some(())
    });
    assert!(removed.is_some());
}
