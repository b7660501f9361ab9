//! Initial RAM file systems: busybox, an init script, and the modules that it loads.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::Run;

/// What is in an initial RAM file system besides busybox.
#[derive(Debug)]
pub(crate) struct Initramfs<'a> {
    /// The script that is /init.
    pub(crate) init: &'a str,
    /// Directory of one kernel's modules, with its modules.dep.
    pub(crate) modules_dir: &'a Path,
    /// Modules to load, in this order, after what they need.
    pub(crate) modules: &'a [&'a str],
    /// Programs: where they are on this machine. They go to /sbin, and the libraries they need to where they are.
    pub(crate) programs: &'a [&'a Path],
}

impl Initramfs<'_> {
    /// Writes the archive; `staging` is a directory that may be filled and left behind.
    pub(crate) fn write(&self, staging: &Path, out: &Path) -> Result<()> {
        for dir in [
            "bin", "sbin", "dev", "proc", "sys", "modules", "mnt", "root", "tmp", "etc",
        ] {
            let dir = staging.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        }
        copy_program(Path::new("/bin/busybox"), &staging.join("bin/busybox"))?;
        let applets = Run::new("/bin/busybox").arg("--list").text()?;
        for applet in applets.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", staging.join("bin").join(applet)).context("link an applet")?;
        }
        let dep = self.modules_dir.join("modules.dep");
        let dep = fs::read_to_string(&dep).with_context(|| format!("read {}", dep.display()))?;
        let mut order = String::new();
        for path in resolve_modules(&dep, self.modules)? {
            order.push_str(&self.copy_module(&path, staging)?);
            order.push('\n');
        }
        fs::write(staging.join("modules/order"), order).context("write the module order")?;
        for program in self.programs {
            let name = program.file_name().context("a program has a name")?;
            copy_program(program, &staging.join("sbin").join(name))?;
            copy_libraries(program, staging)?;
        }
        let init = staging.join("init");
        fs::write(&init, self.init).context("write /init")?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("chmod /init")?;
        let pack = "find . | cpio --quiet -o -H newc -R 0:0 > \"$OUT\"";
        Run::new("sh")
            .args(["-c", pack])
            .env("OUT", out)
            .dir(staging)
            .deadline(Duration::from_secs(300))
            .done()
    }

    /// Copies a module, uncompressed, and returns its file name.
    fn copy_module(&self, path: &str, staging: &Path) -> Result<String> {
        let source = self.modules_dir.join(path);
        let name = source
            .file_name()
            .context("a module has a name")?
            .to_string_lossy();
        let plain = name.trim_end_matches(".xz").to_owned();
        let target = staging.join("modules").join(&plain);
        if plain == name {
            fs::copy(&source, &target).with_context(|| format!("copy {}", source.display()))?;
        } else {
            let script = "xz -dc \"$FROM\" > \"$TO\"";
            let run = Run::new("sh").args(["-c", script]);
            run.env("FROM", &source).env("TO", &target).done()?;
        }
        Ok(plain)
    }
}

/// Paths of `wanted` and of everything they need, each after what it needs; `dep` is a modules.dep.
///
/// A module that is not there is built into the kernel, or the init script fails for lack of its device.
fn resolve_modules(dep: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let line = dep.lines().find(|line| {
            line.split(':')
                .next()
                .is_some_and(|path| module_name(path) == name.replace('-', "_"))
        });
        let Some((path, needs)) = line.and_then(|line| line.split_once(':')) else {
            continue;
        };
        // modules.dep(5) lists what is needed with the deepest need last.
        let needs = needs.split_whitespace().rev();
        for path in needs.chain([path]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    if order.is_empty() {
        bail!("none of the modules {wanted:?} is in modules.dep");
    }
    Ok(order)
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn copy_program(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).context("make it executable")
}

/// Copies the shared libraries of `program`, if it has any, to the same places.
fn copy_libraries(program: &Path, staging: &Path) -> Result<()> {
    // Fails for a static program.
    let Ok(list) = Run::new("ldd").arg(program).text() else {
        return Ok(());
    };
    for library in list.split_whitespace().filter(|word| word.starts_with('/')) {
        let target: PathBuf = staging.join(library.trim_start_matches('/'));
        let dir = target.parent().context("a library is in a directory")?;
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        copy_program(Path::new(library), &target)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/net/net_failover.ko.xz kernel/net/core/failover.ko.xz
kernel/drivers/net/net_failover.ko.xz: kernel/net/core/failover.ko.xz
kernel/net/core/failover.ko.xz:
kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz
kernel/arch/x86/kvm/kvm.ko.xz:
";

    #[test]
    fn a_module_is_listed_once_and_after_its_dependencies() {
        let order = resolve_modules(DEP, &["virtio_net", "net_failover", "kvm_amd"]).unwrap();
        let names: Vec<String> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(
            names,
            ["failover", "net_failover", "virtio_net", "kvm", "kvm_amd"]
        );
    }

    #[test]
    fn a_built_in_module_is_no_error_but_a_wrong_list_is() {
        assert_eq!(resolve_modules(DEP, &["ext4", "kvm"]).unwrap().len(), 1);
        assert!(resolve_modules(DEP, &["ext4"]).is_err());
    }
}
