//! No source file is longer than a reader can hold: 500 lines of production code, 800 with its tests.

use crate::Tree;

const PRODUCTION_LINES_MAX: usize = 500;
const LINES_MAX: usize = 800;

fn findings(tree: &Tree) -> Vec<String> {
    let mut findings = vec![];
    for (path, source) in tree.sources() {
        let lines = source.lines().count();
        let production = production_lines(path, source);
        if production > PRODUCTION_LINES_MAX {
            findings.push(format!(
                "{path} has {production} lines before its tests, {PRODUCTION_LINES_MAX} are allowed: \
                 split it by state or by direction"
            ));
        } else if lines > LINES_MAX {
            findings.push(format!(
                "{path} has {lines} lines, {LINES_MAX} are allowed: move its tests to a file of their own"
            ));
        }
    }
    findings
}

/// Lines before the test module; none for a file that holds only tests.
fn production_lines(path: &str, source: &str) -> usize {
    let only_tests = path.contains("/tests/") || path.ends_with("/tests.rs");
    if only_tests {
        return 0;
    }
    source
        .lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .count()
}

#[test]
fn no_source_file_is_too_long_to_read() {
    crate::assert_none(&findings(&Tree::checkout()));
}

#[test]
fn a_file_with_501_production_lines_is_found() {
    let long = "fn f() {}\n".repeat(501);
    crate::assert_one(
        &findings(&Tree::made_of(&[("a/src/b.rs", &long)])),
        &["a/src/b.rs has 501"],
    );
}

#[test]
fn a_file_with_many_tests_is_found_at_801_lines_and_not_before() {
    let code = |tests| format!("fn f() {{}}\n#[cfg(test)]\n{}", "// t\n".repeat(tests));
    assert_eq!(findings(&Tree::made_of(&[("b.rs", &code(798))])), [""; 0]);
    crate::assert_one(
        &findings(&Tree::made_of(&[("b.rs", &code(799))])),
        &["b.rs has 801"],
    );
}
