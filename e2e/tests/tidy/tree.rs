//! The files that the rules read: those of the checkout, or a few made-up ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Text files by their path from the repository's root, with `/` between folders.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    files: BTreeMap<String, String>,
}

impl Tree {
    /// The files of this checkout that git tracks or would add. Binary files are left out.
    pub(crate) fn checkout() -> Self {
        let root = root();
        let listed = Command::new("git")
            .current_dir(&root)
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .output()
            .expect("run git ls-files");
        assert!(listed.status.success(), "git ls-files failed");
        let names = String::from_utf8(listed.stdout).expect("git prints UTF-8");
        let read = |name: &str| {
            let text = fs::read_to_string(root.join(name)).ok()?;
            Some((name.to_owned(), text))
        };
        let files: BTreeMap<_, _> = names.lines().filter_map(read).collect();
        assert!(files.len() > 300, "only {} files found", files.len());
        Self { files }
    }

    /// A tree of the given files.
    pub(crate) fn made_of(files: &[(&str, &str)]) -> Self {
        let own = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned());
        Self {
            files: files.iter().map(own).collect(),
        }
    }

    /// The text of `path`.
    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(String::as_str)
    }

    /// All paths and texts, sorted by path.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files
            .iter()
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    pub(crate) fn sources(&self) -> impl Iterator<Item = (&str, &str)> {
        self.iter().filter(|(path, _)| path.ends_with(".rs"))
    }

    /// Whether `path` is a file, or a folder with a file in it.
    pub(crate) fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let folder = format!("{path}/");
        self.files.contains_key(path) || self.files.keys().any(|name| name.starts_with(&folder))
    }

    /// Whether a file or folder has a path that ends with the components of `tail`.
    pub(crate) fn has_tail(&self, tail: &str) -> bool {
        let tail = tail.trim_end_matches('/');
        let inner = format!("/{tail}");
        let folder = format!("/{tail}/");
        self.has(tail)
            || self
                .files
                .keys()
                .any(|name| name.ends_with(&inner) || name.contains(&folder))
    }
}

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    let parent = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    parent.expect("e2e lies in the repository").to_owned()
}
