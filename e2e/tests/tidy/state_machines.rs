//! docs/state-machines.md shows the diagrams of the module pages, and stays equal to them.
//!
//! A module page marks its diagram with the heading `# States` and a fenced `text` block. After a change of one,
//! `make state-machines` writes the document anew.

use std::fmt::Write as _;

use crate::Tree;
use crate::tree::root;

const DOCUMENT: &str = "docs/state-machines.md";
const HEAD: &str = "# State machines\n\n\
    The diagrams below are copies of those in the module pages of the code, which are the source: `make state-machines`\n\
    writes this page, and a test compares them.\n";

/// The document that the sources' diagrams make.
fn document(tree: &Tree) -> String {
    let mut text = HEAD.to_owned();
    for (path, source) in tree.sources() {
        let page: Vec<&str> = source
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .map(|line| line.strip_prefix(' ').unwrap_or(line))
            .collect();
        let Some(diagram) = diagram(&page) else {
            continue;
        };
        let title = page[0].trim_end_matches('.');
        write!(
            text,
            "\n## {title}\n\n`{path}`\n\n```text\n{diagram}\n```\n"
        )
        .expect("a string grows");
    }
    text
}

/// The fenced block after the heading `# States`.
fn diagram(page: &[&str]) -> Option<String> {
    let heading = page.iter().position(|line| *line == "# States")?;
    let open = page[heading..].iter().position(|line| *line == "```text")? + heading + 1;
    let length = page[open..].iter().position(|line| *line == "```")?;
    Some(page[open..open + length].join("\n"))
}

fn findings(tree: &Tree) -> Vec<String> {
    let written = tree.text(DOCUMENT).unwrap_or_default();
    if written == document(tree) {
        vec![]
    } else {
        vec![format!(
            "{DOCUMENT} is not what the module pages say: run `make state-machines`"
        )]
    }
}

#[test]
fn the_index_of_state_machines_is_current() {
    let tree = Tree::checkout();
    if std::env::var_os("BASCULE_WRITE_STATE_MACHINES").is_some() {
        std::fs::write(root().join(DOCUMENT), document(&tree)).expect("write the document");
        return;
    }
    crate::assert_none(&findings(&tree));
}

#[test]
fn a_diagram_that_was_changed_in_the_code_alone_is_found() {
    let page = "//! A door.\n//!\n//! # States\n//! ```text\n//! Open ─► Shut\n//! ```\n";
    let tree = Tree::made_of(&[("a.rs", page)]);
    let text = document(&tree);
    assert!(
        text.contains("## A door\n\n`a.rs`\n\n```text\nOpen ─► Shut\n```\n"),
        "{text}"
    );
    let changed = page.replace("Shut", "Closed");
    let tree = |source: &str| Tree::made_of(&[("a.rs", source), (DOCUMENT, &text)]);
    assert_eq!(findings(&tree(page)), [""; 0]);
    crate::assert_one(&findings(&tree(&changed)), &["make state-machines"]);
}
