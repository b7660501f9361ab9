//! Writing small files so that a crash leaves the old or the new contents, never half of them.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt, PermissionsExt as _, fchown};
use std::path::Path;

use anyhow::{Context, Result};

/// Replaces a file's contents, creating its folder. Of a file that was there, its group and what that may do are kept.
pub(crate) fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<()> {
    let folder = path.parent().context("a file needs a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = Path::new(&draft);
    let before = fs::metadata(path).ok();
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(mode)
            .open(draft)?;
        if let Some(before) = before.filter(|before| before.mode() & OF_GROUP & !mode != 0) {
            fchown(&file, None, Some(before.gid()))?;
            file.set_permissions(Permissions::from_mode(mode | (before.mode() & OF_GROUP)))?;
        }
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(draft, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// A mode's bits for the group.
const OF_GROUP: u32 = 0o070;

/// The names of the folders in `folder`.
pub(crate) fn names_in(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tls/node.key");
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
}
