//! Every row of the table in docs/field-cases.md names tests that hold it, and they exist and run.

use crate::Tree;
use crate::documents::quoted;

const DOCUMENT: &str = "docs/field-cases.md";
/// How many cases there are, numbered from 1.
const CASES: u32 = 24;
/// Columns of the table: number, input, what Bascule does, tests.
const COLUMNS: usize = 4;

fn findings(tree: &Tree) -> Vec<String> {
    let text = tree.text(DOCUMENT).unwrap_or_default();
    (1..=CASES)
        .flat_map(|number| of_case(tree, text, number))
        .collect()
}

fn of_case(tree: &Tree, text: &str, number: u32) -> Vec<String> {
    let prefix = format!("| {number} |");
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with(&prefix))
        .collect();
    let [line] = lines[..] else {
        return vec![format!("{DOCUMENT} has {} rows {number}", lines.len())];
    };
    let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
    let [_, _, _, tests] = cells[..] else {
        return vec![format!(
            "row {number} of {DOCUMENT} has {} columns, not {COLUMNS}",
            cells.len()
        )];
    };
    let tests: Vec<&str> = quoted(tests).filter(|name| !name.contains('/')).collect();
    if tests.is_empty() {
        return vec![format!("row {number} of {DOCUMENT} names no test")];
    }
    let missing = tests.into_iter().filter(|name| !runs(tree, name));
    missing
        .map(|name| {
            format!(
                "row {number} of {DOCUMENT} names {name}, which is no test that `make test` runs"
            )
        })
        .collect()
}

/// Whether a test has this name, and no test with this name is ignored.
fn runs(tree: &Tree, name: &str) -> bool {
    let definition = format!("fn {name}(");
    let mut attributes = tree
        .sources()
        .flat_map(|(_, source)| {
            source
                .match_indices(&definition)
                .map(|(at, _)| &source[..at])
        })
        .map(attributes_at_end)
        .peekable();
    attributes.peek().is_some()
        && attributes.all(|lines| {
            let is_test = lines.iter().any(|line| line.contains("test]"));
            is_test && !lines.iter().any(|line| line.contains("#[ignore"))
        })
}

/// The attributes and comments right before the end of `text`, which may have begun a function.
fn attributes_at_end(text: &str) -> Vec<&str> {
    let (before, _begun) = text.rsplit_once('\n').unwrap_or_default();
    let lines = before.lines().rev().map(str::trim_start);
    lines
        .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
        .collect()
}

#[test]
fn every_test_that_holds_a_field_case_exists_and_runs() {
    crate::assert_none(&findings(&Tree::checkout()));
}

#[test]
fn a_field_case_without_a_test_that_runs_is_found() {
    let table: String = (1..=CASES)
        .map(|n| format!("| {n} | input | what | `held`, see `a/b.rs` |\n"))
        .collect();
    let sources = "/// Why.\n#[test]\nfn held() {}\n\nfn helper() {}\n\n\
                   #[test]\n#[ignore = \"long\"]\nfn by_hand() {}\n";
    let tree = |table: &str| Tree::made_of(&[(DOCUMENT, table), ("a.rs", sources)]);
    assert_eq!(findings(&tree(&table)), [""; 0]);
    for name in ["gone", "helper", "by_hand"] {
        let other = format!("| 3 | input | what | `held`, `{name}` |");
        let broken = table.replace("| 3 | input | what | `held`, see `a/b.rs` |", &other);
        crate::assert_one(&findings(&tree(&broken)), &["row 3", name]);
    }
    let empty = table.replace("| 24 | input | what | `held`", "| 24 | input | what | held");
    crate::assert_one(&findings(&tree(&empty)), &["row 24", "names no test"]);
    let narrow = table.replace("| 5 | input | what |", "| 5 | input |");
    crate::assert_one(&findings(&tree(&narrow)), &["row 5", "columns"]);
    let without = table.replace("| 7 |", "| x |");
    crate::assert_one(&findings(&tree(&without)), &["0 rows 7"]);
    let twice = table.replace("| 7 |", "| 6 |");
    assert_eq!(findings(&tree(&twice)).len(), 2, "two rows 6 and no row 7");
}
