//! What prose and structure promise, checked: dependency directions, paths and test names that the
//! documents mention, sizes of files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Crates that decide: pure, so that they can be model-checked and simulated.
const DECISION_CRATES: [&str; 5] = [
    "bascule-types",
    "bascule-volume-format",
    "bascule-volume-protocol",
    "bascule-migrate",
    "bascule-operator-core",
];
/// What a decision must not know.
const FORBIDDEN: [&str; 8] = [
    "kube",
    "kube-core",
    "k8s-openapi",
    "tonic",
    "tokio",
    "kvm-ioctls",
    "kvm-bindings",
    "hyper",
];
/// A file longer than this, tests included, is to be split by state or by direction.
const LINES_MAX: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the checkout")
        .to_owned()
}

#[test]
fn decision_crates_know_neither_kubernetes_nor_grpc_nor_tokio_nor_kvm() {
    for name in DECISION_CRATES {
        let output = Command::new(env!("CARGO"))
            .current_dir(root())
            .args([
                "tree",
                "--locked",
                "--edges",
                "normal",
                "--prefix",
                "none",
                "--package",
                name,
            ])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let tree = String::from_utf8(output.stdout).unwrap();
        let known: BTreeSet<&str> = tree
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert!(known.contains(name), "cargo tree says nothing of {name}");
        for forbidden in FORBIDDEN {
            assert!(!known.contains(forbidden), "{name} depends on {forbidden}");
        }
    }
}

#[test]
fn every_path_that_the_documents_mention_exists() {
    let root = root();
    for document in [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ] {
        let text = fs::read_to_string(root.join(document)).unwrap();
        for quoted in quoted(&text) {
            let first = quoted.split('/').next().unwrap_or_default();
            let is_path = quoted.contains('/')
                && [
                    "crds",
                    "operator",
                    "node-daemon",
                    "charts",
                    "e2e",
                    "docs",
                    ".ci",
                ]
                .contains(&first);
            if is_path {
                assert!(root.join(quoted).exists(), "{document} mentions {quoted}");
            }
        }
    }
}

#[test]
fn every_test_that_guards_an_invariant_exists() {
    let sources = sources();
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    for number in 1..=8 {
        let prefix = format!("| I{number} |");
        let line = text.lines().find(|line| line.starts_with(&prefix)).unwrap();
        let names: Vec<&str> = quoted(line).filter(|name| !name.contains('/')).collect();
        assert!(!names.is_empty(), "I{number} is guarded by nothing");
        for name in names {
            let definition = format!("fn {name}(");
            let found = sources
                .iter()
                .any(|(_, source)| source.contains(&definition));
            assert!(
                found,
                "I{number} is guarded by {name}, which does not exist"
            );
        }
    }
}

#[test]
fn no_source_file_is_too_long_to_read() {
    for (path, source) in sources() {
        let lines = source.lines().count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines", path.display());
    }
}

/// What stands between single backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter(|quote| !quote.is_empty() && !quote.contains('\n'))
}

fn sources() -> Vec<(PathBuf, String)> {
    let root = root();
    let listed = Command::new("git")
        .current_dir(&root)
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "*.rs",
        ])
        .output()
        .expect("git ls-files");
    assert!(listed.status.success(), "git ls-files failed");
    let names = String::from_utf8(listed.stdout).expect("git ls-files");
    let read = |name: &str| Some((root.join(name), fs::read_to_string(root.join(name)).ok()?));
    let sources: Vec<_> = names.lines().filter_map(read).collect();
    assert!(
        sources.len() > 100,
        "only {} source files found",
        sources.len()
    );
    sources
}
