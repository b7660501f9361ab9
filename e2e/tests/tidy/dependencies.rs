//! Which crate may depend on which: decisions know no effects, and nothing outside the volume knows its format.

use std::collections::BTreeSet;
use std::process::Command;

use crate::tree::root;

/// A crate, and the crates that must not be among its normal dependencies, direct or not.
struct Rule {
    krate: &'static str,
    forbidden: &'static [&'static str],
}

/// What a decision must not know: it is model-checked and simulated.
const EFFECTS: &[&str] = &[
    "kube",
    "kube-core",
    "k8s-openapi",
    "tonic",
    "tokio",
    "kvm-ioctls",
    "kvm-bindings",
    "hyper",
];
/// Only `bascule-volume` and the crate that starts it may know the on-disk format.
const FORMAT: &[&str] = &["bascule-volume-format", "bascule-volume-protocol"];

const RULES: &[Rule] = &[
    Rule {
        krate: "bascule-types",
        forbidden: EFFECTS,
    },
    Rule {
        krate: "bascule-types",
        forbidden: FORMAT,
    },
    Rule {
        krate: "bascule-volume-format",
        forbidden: EFFECTS,
    },
    Rule {
        krate: "bascule-volume-protocol",
        forbidden: EFFECTS,
    },
    Rule {
        krate: "bascule-migrate",
        forbidden: EFFECTS,
    },
    Rule {
        krate: "bascule-migrate",
        forbidden: FORMAT,
    },
    Rule {
        krate: "bascule-image",
        forbidden: EFFECTS,
    },
    Rule {
        krate: "bascule-image-unpack",
        forbidden: EFFECTS,
    },
    Rule {
        krate: "bascule-operator-core",
        forbidden: EFFECTS,
    },
    Rule {
        krate: "bascule-operator-core",
        forbidden: FORMAT,
    },
    Rule {
        krate: "bascule-operator",
        forbidden: FORMAT,
    },
    Rule {
        krate: "bascule-ipc",
        forbidden: FORMAT,
    },
    Rule {
        krate: "bascule-node-api",
        forbidden: FORMAT,
    },
    Rule {
        krate: "bascule-devices",
        forbidden: FORMAT,
    },
    Rule {
        krate: "bascule-vmm",
        forbidden: FORMAT,
    },
];

fn findings(rule: &Rule, tree: &str) -> Vec<String> {
    let known: BTreeSet<&str> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    if !known.contains(rule.krate) {
        return vec![format!("cargo tree does not know {}", rule.krate)];
    }
    let forbidden = rule.forbidden.iter().filter(|name| known.contains(**name));
    forbidden
        .map(|name| format!("{} depends on {name}", rule.krate))
        .collect()
}

/// The names of all normal dependencies of `krate`, one a line.
fn cargo_tree(krate: &str) -> String {
    let output = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["tree", "--locked", "--edges", "normal", "--prefix", "none"])
        .args(["--package", krate])
        .output()
        .expect("run cargo tree");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree failed: {errors}");
    String::from_utf8(output.stdout).expect("cargo prints UTF-8")
}

#[test]
fn decisions_know_no_effects_and_only_the_volume_knows_its_format() {
    let all = RULES
        .iter()
        .flat_map(|rule| findings(rule, &cargo_tree(rule.krate)));
    crate::assert_none(&all.collect::<Vec<_>>());
}

#[test]
fn a_decision_crate_that_depends_on_tokio_is_found() {
    let rule = Rule {
        krate: "bascule-migrate",
        forbidden: EFFECTS,
    };
    let tree = "bascule-migrate v0.1.0\nserde v1.0.229\ntokio v1.54.1\n";
    crate::assert_one(
        &findings(&rule, tree),
        &["bascule-migrate depends on tokio"],
    );
    crate::assert_one(
        &findings(&rule, "serde v1.0.229\n"),
        &["does not know bascule-migrate"],
    );
}
