//! Transparent huge pages for guests' RAM.
//!
//! `bascule-vm` asks for them (`MADV_HUGEPAGE`), but the RAM is a memory file, and for those the kernel's setting is
//! `never` unless an administrator has changed it (Linux, admin-guide/mm/transhuge, "shmem_enabled"). With `advise`
//! nothing changes for programs that do not ask.

use std::fs;
use std::io;
use std::path::Path;

/// Where the kernel has its setting.
pub(crate) const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Lets guests have huge pages if nobody has: `never` becomes `advise`. Every other choice is the administrator's and stays.
/// Returns whether it was changed; a kernel without huge pages has no setting.
pub(crate) fn allow(setting: &Path) -> io::Result<bool> {
    let choices = match fs::read_to_string(setting) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        choices => choices?,
    };
    let never = choices.contains("[never]");
    if never {
        fs::write(setting, "advise")?;
    }
    Ok(never)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_default_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let setting = folder.path().join("shmem_enabled");
        assert!(!allow(&setting).unwrap(), "a kernel without huge pages");
        assert!(!setting.exists());
        for chosen in ["always", "within_size", "advise", "deny", "force"] {
            let words = ["always", "within_size", "advise", "never", "deny", "force"];
            let text = words.join(" ").replace(chosen, &format!("[{chosen}]"));
            fs::write(&setting, &text).unwrap();
            assert!(!allow(&setting).unwrap(), "{text}");
            assert_eq!(fs::read_to_string(&setting).unwrap(), text);
        }
        fs::write(&setting, "always within_size advise [never] deny force\n").unwrap();
        assert!(allow(&setting).unwrap());
        assert_eq!(fs::read_to_string(&setting).unwrap(), "advise");
    }
}
