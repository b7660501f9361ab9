//! Every invariant in ARCHITECTURE.md names tests that guard it, and they exist.

use crate::Tree;
use crate::documents::quoted;

fn findings(tree: &Tree) -> Vec<String> {
    let text = tree.text("ARCHITECTURE.md").unwrap_or_default();
    (1..=8)
        .flat_map(|number| of_invariant(tree, text, number))
        .collect()
}

fn of_invariant(tree: &Tree, text: &str, number: u32) -> Vec<String> {
    let prefix = format!("| I{number} |");
    let Some(line) = text.lines().find(|line| line.starts_with(&prefix)) else {
        return vec![format!("ARCHITECTURE.md has no line for I{number}")];
    };
    let tests: Vec<&str> = quoted(line).filter(|name| !name.contains('/')).collect();
    if tests.is_empty() {
        return vec![format!("I{number} names no test")];
    }
    let exists = |name: &str| {
        let definition = format!("fn {name}(");
        tree.sources()
            .any(|(_, source)| source.contains(&definition))
    };
    let missing = tests.into_iter().filter(|name| !exists(name));
    missing
        .map(|name| format!("I{number} names the test {name}, which does not exist"))
        .collect()
}

#[test]
fn every_test_that_guards_an_invariant_exists() {
    crate::assert_none(&findings(&Tree::checkout()));
}

#[test]
fn an_invariant_with_a_missing_test_is_found() {
    let table: String = (1..=8)
        .map(|n| format!("| I{n} | text | `guard` |\n"))
        .collect();
    let tests = ("a.rs", "fn guard() {}");
    let tree = |table: &str| Tree::made_of(&[("ARCHITECTURE.md", table), tests]);
    assert_eq!(findings(&tree(&table)), [""; 0]);
    let broken = table.replace("I3 | text | `guard`", "I3 | text | `gone`");
    crate::assert_one(&findings(&tree(&broken)), &["I3 names the test gone"]);
    let empty = table.replace("I4 | text | `guard`", "I4 | text | nothing");
    crate::assert_one(&findings(&tree(&empty)), &["I4 names no test"]);
    let without = table.replace("| I8 |", "| J8 |");
    crate::assert_one(&findings(&tree(&without)), &["no line for I8"]);
}
