//! Rules about structure and prose that no compiler checks, for the whole repository.
//!
//! Every rule is a pure function from a [`Tree`] to a list of findings. It has two tests beside it: the
//! checkout has no finding, and a small made-up tree that breaks the rule has one. Read next: `tree.rs`.

mod dependencies;
mod documents;
mod field_cases;
mod invariants;
mod modules;
mod sizes;
mod state_machines;
mod tree;
mod unsafe_code;

use tree::Tree;

/// Fails with every finding, one a line.
#[track_caller]
fn assert_none(findings: &[String]) {
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

/// Fails unless exactly one finding exists and contains every one of `parts`.
#[track_caller]
fn assert_one(findings: &[String], parts: &[&str]) {
    assert_eq!(findings.len(), 1, "{findings:#?}");
    for part in parts {
        assert!(
            findings[0].contains(part),
            "{:?} lacks {part:?}",
            findings[0]
        );
    }
}
