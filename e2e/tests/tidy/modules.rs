//! The modules of a crate have no circles: below every module, its children form a directed acyclic graph.
//!
//! A child stands for everything below it, and for the code in its own file. A path is followed through
//! re-exports to the module that defines the item. That a child uses its parent's items is no circle: it is a
//! part of its parent. Code under `#[cfg(test)]` may use everything.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::{self, Visit};

use crate::Tree;

type ModulePath = Vec<String>;

/// One module, by its file.
#[derive(Debug, Default)]
struct Module {
    children: BTreeSet<String>,
    /// Names that a `use` brings into this module, by the absolute path they stand for.
    names: BTreeMap<String, ModulePath>,
    /// Absolute paths that this module's code mentions.
    mentions: BTreeSet<ModulePath>,
}

/// The modules of one crate, by their path from its root.
type Modules = BTreeMap<ModulePath, Module>;

fn findings(tree: &Tree) -> Vec<String> {
    let roots = tree
        .sources()
        .map(|(path, _)| path)
        .filter(|path| is_root(path));
    roots
        .flat_map(|root| {
            let modules = modules_of(tree, root);
            circles(&modules)
                .into_iter()
                .map(move |circle| format!("{root}: circle {circle}"))
        })
        .collect()
}

/// Whether `path` is the root of a library or a program.
fn is_root(path: &str) -> bool {
    let in_source = path.ends_with("src/lib.rs") || path.ends_with("src/main.rs");
    in_source || path.ends_with("/demo/main.rs") || path.ends_with("/bench/main.rs")
}

fn modules_of(tree: &Tree, root: &str) -> Modules {
    let mut modules = Modules::new();
    let mut open = vec![(ModulePath::new(), root.to_owned())];
    while let Some((path, file)) = open.pop() {
        let Some(source) = tree.text(&file) else {
            continue;
        };
        let parsed = syn::parse_file(source).expect("a source file parses");
        let mut reader = Reader {
            path: &path,
            module: Module::default(),
        };
        reader.visit_file(&parsed);
        let folder = match file.strip_suffix(".rs") {
            Some(stem) if path.is_empty() => stem.rsplit_once('/').map_or("", |(folder, _)| folder),
            Some(stem) => stem,
            None => "",
        };
        for child in &reader.module.children {
            let mut inner = path.clone();
            inner.push(child.clone());
            open.push((inner, format!("{folder}/{child}.rs")));
        }
        modules.insert(path.clone(), reader.module);
    }
    modules
}

/// Collects one file's child modules, imports and mentioned paths.
struct Reader<'a> {
    path: &'a [String],
    module: Module,
}

impl Reader<'_> {
    /// The absolute path of one that begins with `crate`, `self` or `super`; none for another crate's.
    fn absolute(&self, segments: &[String]) -> Option<ModulePath> {
        let (first, rest) = segments.split_first()?;
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([self.path, rest].concat()),
            "super" => {
                let above = &self.path[..self.path.len().checked_sub(1)?];
                let parent = Reader {
                    path: above,
                    module: Module::default(),
                };
                match rest.first() {
                    Some(next) if next == "super" => parent.absolute(rest),
                    _ => Some([above, rest].concat()),
                }
            }
            child if self.module.children.contains(child) => Some([self.path, segments].concat()),
            _ => None,
        }
    }

    fn import(&mut self, prefix: &[String], tree: &syn::UseTree) {
        let with = |name: String| [prefix, &[name]].concat();
        match tree {
            syn::UseTree::Path(path) => self.import(&with(path.ident.to_string()), &path.tree),
            syn::UseTree::Name(name) if name.ident == "self" => self.name(prefix, None),
            syn::UseTree::Name(name) => self.name(&with(name.ident.to_string()), None),
            syn::UseTree::Rename(name) => {
                self.name(&with(name.ident.to_string()), Some(name.rename.to_string()));
            }
            syn::UseTree::Glob(_) => self.name(prefix, Some(String::new())),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.import(prefix, tree);
                }
            }
        }
    }

    fn name(&mut self, segments: &[String], renamed: Option<String>) {
        let Some(absolute) = self.absolute(segments) else {
            return;
        };
        let last = segments.last().cloned().unwrap_or_default();
        self.module
            .names
            .insert(renamed.unwrap_or(last), absolute.clone());
        self.module.mentions.insert(absolute);
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_file(&mut self, file: &'ast syn::File) {
        for item in &file.items {
            if let syn::Item::Mod(item) = item
                && item.content.is_none()
                && !is_test(&item.attrs)
            {
                self.module.children.insert(item.ident.to_string());
            }
        }
        visit::visit_file(self, file);
    }

    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = match item {
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Struct(item) => &item.attrs,
            syn::Item::Use(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !is_test(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.import(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        let starts = segments.first().map(String::as_str);
        if matches!(starts, Some("crate" | "super"))
            && let Some(absolute) = self.absolute(&segments)
        {
            self.module.mentions.insert(absolute);
        }
        visit::visit_path(self, path);
    }
}

/// Whether an item is compiled for tests alone.
fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) if list.path.is_ident("cfg") => {
            let tokens = list.tokens.to_string();
            tokens
                .split(|c: char| !c.is_alphanumeric())
                .any(|word| word == "test")
        }
        _ => false,
    })
}

/// The module that defines what `mention` names.
fn definition(modules: &Modules, mention: &[String]) -> ModulePath {
    let mut at = ModulePath::new();
    let mut rest: Vec<String> = mention.to_vec();
    // A chain of re-exports is as long as a crate is deep; a circle of them does not compile.
    for _ in 0..32 {
        let Some(next) = rest.first().cloned() else {
            return at;
        };
        let module = &modules[&at];
        if module.children.contains(&next)
            && modules.contains_key(&[&at[..], std::slice::from_ref(&next)].concat())
        {
            at.push(next);
            rest.remove(0);
        } else if let Some(target) = module.names.get(&next) {
            rest = [&target[..], &rest[1..]].concat();
            at.clear();
        } else {
            return at;
        }
    }
    at
}

/// The circles among siblings, each as `a → b → a`, once.
fn circles(modules: &Modules) -> Vec<String> {
    let mut edges: BTreeMap<ModulePath, BTreeSet<ModulePath>> = BTreeMap::new();
    for (path, module) in modules {
        for mention in &module.mentions {
            let target = definition(modules, mention);
            let common = path.iter().zip(&target).take_while(|(a, b)| a == b).count();
            if common < path.len() && common < target.len() {
                let from = path[..=common].to_vec();
                edges
                    .entry(from)
                    .or_default()
                    .insert(target[..=common].to_vec());
            }
        }
    }
    let mut found = BTreeSet::new();
    for start in edges.keys() {
        if let Some(mut circle) = way_back(&edges, start) {
            let least = circle.iter().enumerate().min_by_key(|(_, path)| *path);
            let least = least.map_or(0, |(index, _)| index);
            circle.rotate_left(least);
            circle.push(circle[0].clone());
            let names: Vec<String> = circle.iter().map(|path| path.join("::")).collect();
            found.insert(names.join(" → "));
        }
    }
    found.into_iter().collect()
}

/// A shortest way from `start` over the edges back to it, without its end.
fn way_back(
    edges: &BTreeMap<ModulePath, BTreeSet<ModulePath>>,
    start: &ModulePath,
) -> Option<Vec<ModulePath>> {
    let mut ways = std::collections::VecDeque::from([vec![start.clone()]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for next in edges.get(&way[way.len() - 1]).into_iter().flatten() {
            if next == start {
                return Some(way);
            }
            if seen.insert(next.clone()) {
                ways.push_back([&way[..], std::slice::from_ref(next)].concat());
            }
        }
    }
    None
}

#[test]
fn modules_of_a_crate_have_no_circles() {
    crate::assert_none(&findings(&Tree::checkout()));
}

#[test]
fn two_siblings_that_use_each_other_are_found() {
    let tree = Tree::made_of(&[
        ("x/src/lib.rs", "mod a; mod b; mod c;"),
        ("x/src/a.rs", "use crate::b::B; pub struct A;"),
        ("x/src/b.rs", "pub struct B; fn f(a: &super::a::A) {}"),
        ("x/src/c.rs", "use crate::a::A;"),
    ]);
    crate::assert_one(&findings(&tree), &["x/src/lib.rs", "a → b → a"]);
}

#[test]
fn a_circle_below_a_module_and_through_a_re_export_is_found() {
    let tree = Tree::made_of(&[
        ("x/src/lib.rs", "mod a;"),
        (
            "x/src/a.rs",
            "mod b; mod c; pub use b::B; pub use self::c::C;",
        ),
        ("x/src/a/b.rs", "use super::C; pub struct B;"),
        (
            "x/src/a/c.rs",
            "pub struct C; fn f() -> crate::a::B { todo!() }",
        ),
    ]);
    crate::assert_one(&findings(&tree), &["a::b → a::c → a::b"]);
}

#[test]
fn a_child_may_use_its_parent_and_a_test_may_use_everything() {
    let tree = Tree::made_of(&[
        ("x/src/lib.rs", "mod a; mod b;"),
        ("x/src/a.rs", "mod inner; pub struct A;"),
        ("x/src/a/inner.rs", "use super::A; use crate::b::B;"),
        (
            "x/src/b.rs",
            "pub struct B;\n#[cfg(test)] mod tests { use crate::a::A; }",
        ),
    ]);
    assert_eq!(findings(&tree), [""; 0]);
}
