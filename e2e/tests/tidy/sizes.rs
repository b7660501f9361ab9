//! No source file is longer than a reader can hold: 500 lines of production code, 800 with its tests.

use crate::Tree;

const PRODUCTION_LINES_MAX: usize = 500;
const LINES_MAX: usize = 800;

fn findings(tree: &Tree) -> Vec<String> {
    let mut findings = vec![];
    for (path, source) in tree.sources() {
        let lines = source.lines().count();
        let production = production_lines(tree, path, source);
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
fn production_lines(tree: &Tree, path: &str, source: &str) -> usize {
    if path.contains("/tests/") || is_test_module(tree, path) {
        return 0;
    }
    source
        .lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .count()
}

/// Whether the module at `path`, or one that it is below, is declared for tests alone.
fn is_test_module(tree: &Tree, path: &str) -> bool {
    let Some((folder, file)) = path.rsplit_once('/') else {
        return false;
    };
    let parent = format!("{folder}.rs");
    if tree.text(&parent).is_some() && is_test_module(tree, &parent) {
        return true;
    }
    let declaration = format!("#[cfg(test)]\nmod {};", file.trim_end_matches(".rs"));
    let parents = [
        format!("{folder}.rs"),
        format!("{folder}/lib.rs"),
        format!("{folder}/main.rs"),
    ];
    parents
        .iter()
        .filter_map(|parent| tree.text(parent))
        .any(|source| source.contains(&declaration))
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

#[test]
fn a_module_for_tests_has_no_production_lines() {
    let long = "fn f() {}\n".repeat(501);
    let tree = |parent| Tree::made_of(&[("a/src/b.rs", parent), ("a/src/b/model.rs", &long)]);
    assert_eq!(findings(&tree("#[cfg(test)]\nmod model;\n")), [""; 0]);
    crate::assert_one(
        &findings(&tree("mod model;\n")),
        &["a/src/b/model.rs has 501"],
    );
    let below = [
        ("a/src/lib.rs", "#[cfg(test)]\nmod sim;\n"),
        ("a/src/sim.rs", "mod world;\n"),
        ("a/src/sim/world.rs", long.as_str()),
    ];
    assert_eq!(findings(&Tree::made_of(&below)), [""; 0]);
}
