//! Unsafe code lies only below the paths that CONTRIBUTING.md lists, and each of them has some.

use syn::visit::{self, Visit};

use crate::Tree;
use crate::documents::quoted;

fn findings(tree: &Tree) -> Vec<String> {
    let text = tree.text("CONTRIBUTING.md").unwrap_or_default();
    let allowed = allowed(text);
    if allowed.is_empty() {
        return vec!["CONTRIBUTING.md has no list of paths with unsafe code".to_owned()];
    }
    let used: Vec<&str> = tree
        .sources()
        .filter(|(_, source)| has_unsafe(source))
        .map(|(path, _)| path)
        .collect();
    let below =
        |path: &str, folder: &str| path == folder || path.starts_with(&format!("{folder}/"));
    let unlisted = used
        .iter()
        .filter(|path| !allowed.iter().any(|folder| below(path, folder)))
        .map(|path| format!("{path} has unsafe code, which CONTRIBUTING.md does not list"));
    let idle = allowed
        .iter()
        .filter(|folder| !used.iter().any(|path| below(path, folder)))
        .map(|folder| format!("CONTRIBUTING.md lists {folder}, which has no unsafe code"));
    unlisted.chain(idle).collect()
}

/// The quoted paths of the list item that begins with "**Unsafe code**".
fn allowed(contributing: &str) -> Vec<String> {
    let start = contributing
        .find("- **Unsafe code**")
        .map(|at| &contributing[at + 2..]);
    let item = start
        .and_then(|text| text.split("\n- ").next())
        .unwrap_or_default();
    let paths = quoted(item).filter(|quote| quote.contains('/'));
    paths
        .map(|path| path.trim_end_matches('/').to_owned())
        .collect()
}

fn has_unsafe(source: &str) -> bool {
    let mut finder = Finder { found: false };
    let file = syn::parse_file(source).expect("a source file parses");
    finder.visit_file(&file);
    finder.found
}

struct Finder {
    found: bool,
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_expr_unsafe(&mut self, _: &'ast syn::ExprUnsafe) {
        self.found = true;
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        self.found |= item.unsafety.is_some();
        visit::visit_item_impl(self, item);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        self.found |= matches!(signature.safety, syn::Safety::Unsafe(_));
        visit::visit_signature(self, signature);
    }

    /// A macro's body is not parsed: its words outside string literals are searched.
    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        let tokens = item.tokens.to_string();
        let mut words = tokens.split('"').step_by(2).flat_map(str::split_whitespace);
        self.found |= words.any(|word| word == "unsafe");
    }
}

#[test]
fn unsafe_code_lies_where_contributing_says() {
    crate::assert_none(&findings(&Tree::checkout()));
}

#[test]
fn unsafe_code_elsewhere_and_a_listed_path_without_any_are_found() {
    let list = "- **Unsafe code** only in `a/src` and `b/src`.\n- other `c/src`\n";
    let block = "fn f() { let x = unsafe { g() }; }";
    let tree = |files: &[(&str, &str)]| {
        let mut all = vec![("CONTRIBUTING.md", list)];
        all.extend_from_slice(files);
        findings(&Tree::made_of(&all))
    };
    let clean = [
        ("a/src/x.rs", block),
        ("b/src/y.rs", "unsafe impl Send for T {}"),
    ];
    assert_eq!(tree(&clean), [""; 0]);
    let elsewhere = [clean[0], clean[1], ("c/src/z.rs", "unsafe fn f() {}")];
    crate::assert_one(&tree(&elsewhere), &["c/src/z.rs has unsafe code"]);
    crate::assert_one(&tree(&clean[..1]), &["lists b/src"]);
    let comment = [
        clean[0],
        clean[1],
        ("c/src/z.rs", "// unsafe { }\nfn f() {}"),
    ];
    assert_eq!(tree(&comment), [""; 0]);
}
