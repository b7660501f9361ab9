//! Every target on every input of its corpus, without libFuzzer.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bascule_fuzz::{TARGETS, Target};

/// Runs a target on each input of its folder in `corpora`; returns the paths of those on which it panics.
///
/// # Panics
/// When the folder has too few inputs, or too long ones: a corpus that is not there would be no test.
fn replay(corpora: &Path, target: Target) -> Vec<String> {
    let folder = corpora.join(target.name);
    let mut inputs: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    inputs.sort();
    let shown = folder.display();
    assert!(inputs.len() >= INPUTS_MIN, "{shown} has too few inputs");
    let mut bytes = 0;
    let mut findings = vec![];
    for path in inputs {
        let input = fs::read(&path).unwrap();
        bytes += input.len();
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
            findings.push(path.display().to_string());
        }
    }
    assert!(
        bytes <= CORPUS_BYTES_MAX,
        "{shown} has {bytes} bytes: minimise it"
    );
    findings
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn no_input_of_a_corpus_makes_its_target_panic() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let findings: Vec<_> = TARGETS
        .iter()
        .flat_map(|target| replay(&corpora, *target))
        .collect();
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn every_target_has_a_program_and_a_corpus_and_there_are_no_others() {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut targets: Vec<_> = TARGETS
        .iter()
        .map(|target| target.name.to_owned())
        .collect();
    targets.sort();
    assert_eq!(names_in(&crate_folder.join("targets")), targets);
    assert_eq!(names_in(&crate_folder.join("corpus")), targets);
    let manifest = fs::read_to_string(crate_folder.join("Cargo.toml")).unwrap();
    for target in &targets {
        let program = fs::read_to_string(crate_folder.join(format!("targets/{target}.rs")));
        assert!(program.unwrap().contains(&format!("named(\"{target}\")")));
        assert!(
            manifest.contains(&format!("name = \"{target}\"")),
            "{target}"
        );
    }
}

#[test]
fn an_input_that_panics_is_named_and_an_empty_corpus_is_an_error() {
    let corpora = tempfile::tempdir().unwrap();
    let target = Target {
        name: "made_up",
        run: |input| assert_ne!(input, b"bad", "a finding"),
    };
    let folder = corpora.path().join("made_up");
    let run = || catch_unwind(|| replay(corpora.path(), target));
    assert!(run().is_err(), "no folder");
    fs::create_dir(&folder).unwrap();
    assert!(run().is_err(), "an empty folder");
    for (name, input) in [("a", "good"), ("b", "bad"), ("c", "")] {
        fs::write(folder.join(name), input).unwrap();
    }
    let findings = run().unwrap();
    assert_eq!(findings, [folder.join("b").display().to_string()]);
}

const INPUTS_MIN: usize = 3;
const CORPUS_BYTES_MAX: usize = 16 << 10;
