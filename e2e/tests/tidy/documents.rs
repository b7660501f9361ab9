//! What the documents name exists: files, folders, make targets, tests, links.
//!
//! Checked are the Markdown documents of the repository and the comments of its sources.

use crate::Tree;

/// Folders at the repository's root; a quoted path that begins with one is a path of the repository.
const TOP: &[&str] = &[
    "crds",
    "operator",
    "node-daemon",
    "charts",
    "e2e",
    "docs",
    "examples",
    ".ci",
    ".github",
    ".devcontainer",
];
/// Files that programs write or users name, which the repository does not contain.
const RUNTIME_FILES: &[&str] = &[];

fn findings(tree: &Tree) -> Vec<String> {
    let mut findings = vec![];
    for (path, text) in tree.iter() {
        if path.ends_with(".md") {
            in_document(tree, path, text, &mut findings);
        } else if path.ends_with(".rs") && !path.contains("/tests/tidy/") {
            in_comments(tree, path, text, &mut findings);
        }
    }
    findings
}

fn in_document(tree: &Tree, document: &str, text: &str, findings: &mut Vec<String>) {
    for quote in quoted(text) {
        if let Some(missing) = missing(tree, document, quote) {
            findings.push(format!(
                "{document} names {missing} `{quote}`, which does not exist"
            ));
        }
    }
    for link in links(text) {
        let target = link.split('#').next().unwrap_or_default();
        let outside = link.contains("://") || link.starts_with('#') || link.starts_with("mailto:");
        if !outside && !tree.has(&beside(document, target)) {
            findings.push(format!("{document} links to {link}, which does not exist"));
        }
    }
}

/// What kind of thing a quote names that is not there.
fn missing(tree: &Tree, document: &str, quote: &str) -> Option<&'static str> {
    if let Some(target) = quote.strip_prefix("make ") {
        let target = target.split_whitespace().next()?;
        let rule = format!("\n{target}:");
        let makefile = tree.text("Makefile").unwrap_or_default();
        return (!makefile.contains(&rule)).then_some("the make target");
    }
    if is_path(quote) {
        let known = tree.has(quote) || tree.has(&beside(document, quote));
        return (!known).then_some("the path");
    }
    if is_file_name(quote) && !RUNTIME_FILES.contains(&quote) {
        return (!tree.has_tail(quote)).then_some("the file");
    }
    if is_test_name(quote) {
        let function = format!("fn {quote}(");
        let known = tree.sources().any(|(_, source)| source.contains(&function));
        return (!known).then_some("the test");
    }
    None
}

/// A sentence with underscores, as tests are named.
fn is_test_name(quote: &str) -> bool {
    let words = quote.split('_').count();
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    words >= 5 && quote.chars().all(plain)
}

fn is_path(quote: &str) -> bool {
    let first = quote.split('/').next().unwrap_or_default();
    quote.contains('/') && TOP.contains(&first) && !quote.contains([' ', '*', '<', '{', '…'])
}

/// A bare source, manifest or document name, such as `plan.rs` or `layout.rs`.
fn is_file_name(quote: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    let sourced = [".rs", ".md", ".proto"]
        .iter()
        .any(|end| quote.ends_with(end));
    sourced && quote.chars().all(plain) && !quote.starts_with('/') && !quote.starts_with('.')
}

fn in_comments(tree: &Tree, source: &str, text: &str, findings: &mut Vec<String>) {
    for line in text.lines() {
        let trimmed = line.trim_start();
        let Some(comment) = trimmed.strip_prefix("//") else {
            continue;
        };
        let words = comment.split(|c: char| c.is_whitespace() || "`()[],;:\"'".contains(c));
        for word in words {
            let word = word.trim_end_matches('.');
            let beside = beside(source, word);
            if is_file_name(word) && !tree.has(&beside) && !tree.has_tail(word) {
                findings.push(format!("{source} names {word}, which does not exist"));
            }
        }
    }
}

/// `path`, read from the folder of `file`.
fn beside(file: &str, path: &str) -> String {
    let mut parts: Vec<&str> = file.split('/').collect();
    parts.pop();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// What stands between single backticks on one line; fenced blocks are left out.
pub(crate) fn quoted(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines()
        .filter(move |line| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fenced && !fence
        })
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(|quote| !quote.is_empty())
}

/// The targets of Markdown links.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let after = text.split("](").skip(1);
    after.filter_map(|rest| rest.split(')').next())
}

#[test]
fn what_documents_and_comments_name_exists() {
    crate::assert_none(&findings(&Tree::checkout()));
}

#[test]
fn a_document_that_names_a_missing_file_or_test_is_found() {
    let makefile = ("Makefile", ".PHONY: test\ntest: ## Tests\n");
    let source = (
        "operator/src/plan.rs",
        "fn a_plan_says_what_to_do_next() {}",
    );
    let tree = |text| Tree::made_of(&[makefile, source, ("docs/a.md", text)]);
    let good = "`make test` `operator/src/plan.rs` `plan.rs` `a_plan_says_what_to_do_next` [x](../Makefile#y)";
    assert_eq!(findings(&tree(good)), [""; 0]);
    for (text, named) in [
        ("`make tests`", "make tests"),
        ("`operator/src/gone.rs`", "operator/src/gone.rs"),
        ("see `gone.rs`", "gone.rs"),
        (
            "`a_plan_says_what_to_do_last`",
            "a_plan_says_what_to_do_last",
        ),
        ("[x](gone.md)", "gone.md"),
    ] {
        crate::assert_one(&findings(&tree(text)), &["docs/a.md", named]);
    }
}

#[test]
fn a_comment_that_names_a_missing_file_is_found() {
    let tree = |text| Tree::made_of(&[("a/src/b.rs", text), ("a/src/c.rs", "")]);
    assert_eq!(
        findings(&tree("//! Read next: `c.rs`, (src/c.rs).\n")),
        [""; 0]
    );
    crate::assert_one(
        &findings(&tree("//! See LAB.md.\n")),
        &["a/src/b.rs", "LAB.md"],
    );
}
