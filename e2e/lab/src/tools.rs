//! The programs that a lab needs: Debian packages, and Kubernetes and its companions built from Go modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cache::cached;
use crate::command::Run;
use crate::progress::step;

/// Paths of the built programs.
#[derive(Debug, Clone)]
pub struct Tools {
    dirs: Vec<PathBuf>,
}

impl Tools {
    /// Finds the programs in the cache, or builds them: about 16 min on 2 cores when everything is missing.
    pub fn ensure() -> Result<Self> {
        let mut dirs = Vec::new();
        for module in &MODULES {
            let key = module.key()?;
            let what = format!("building {key} ({})", module.cost);
            dirs.push(cached(&key, &what, |dir| module.build(dir))?.join("bin"));
        }
        Ok(Self { dirs })
    }

    /// Absolute path of a program, for example `kubectl`.
    pub fn path(&self, program: &str) -> Result<PathBuf> {
        let found = self
            .dirs
            .iter()
            .map(|dir| dir.join(program))
            .find(|path| path.exists());
        found.with_context(|| format!("{program} is not among the lab's tools"))
    }

    /// Directories of all programs, for a `PATH`.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }
}

/// Installs the Debian packages among `packages` that are missing.
pub fn ensure_packages(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|name| !installed(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(
        &format!("installing {} (once; usually 1 min)", missing.join(", ")),
        || {
            let apt = |words: &[&str]| {
                Run::new("apt-get")
                    .env("DEBIAN_FRONTEND", "noninteractive")
                    .args(words)
                    .deadline(Duration::from_secs(900))
                    .done()
            };
            apt(&["update"])?;
            apt(&[&["install", "-y", "--no-install-recommends"], &missing[..]].concat())
        },
    )
}

fn installed(package: &str) -> bool {
    let query = Run::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .text();
    query.is_ok_and(|status| status == "installed")
}

/// The `lab` program itself, which is the lab's launcher, a node's PID 1, web server and BMC as well.
///
/// `BASCULE_LAB_BIN`; else this process, if it is `lab`; else the `lab` that cargo built beside this test program.
pub fn lab_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BASCULE_LAB_BIN") {
        return Ok(PathBuf::from(path));
    }
    let this = std::env::current_exe().context("find this program's own file")?;
    if this.file_name().is_some_and(|name| name == "lab") {
        return Ok(this);
    }
    // target/debug/deps/a_test-0123 → target/debug/lab
    let beside = this.ancestors().skip(1).take(2).map(|dir| dir.join("lab"));
    match beside.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("no lab program: set BASCULE_LAB_BIN or `cargo build -p bascule-lab`"),
    }
}

/// Fails unless `program` runs without shared libraries, as on an emulated node that has others than this machine.
pub fn require_static(program: &Path) -> Result<()> {
    let bytes = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let head = &bytes[..bytes.len().min(4096)];
    if head.windows(8).any(|window| window == b"ld-linux") {
        bail!(
            "{} is linked dynamically; build it with RUSTFLAGS='-C target-feature=+crt-static' \
             cargo build --target x86_64-unknown-linux-gnu",
            program.display()
        );
    }
    Ok(())
}

/// A Go module of e2e/tools, embedded in this program, so that the cache key always matches what is built.
struct GoModule {
    /// Prefix of the cache key.
    name: &'static str,
    /// Label and module path of each dependency whose version is part of the cache key.
    keyed_by: &'static [(&'static str, &'static str)],
    files: &'static [(&'static str, &'static str)],
    /// Package paths of the programs.
    packages: &'static [&'static str],
    /// Package path and program name, where the name is not the path's last element.
    renamed: &'static [(&'static str, &'static str)],
    cost: &'static str,
}

impl GoModule {
    fn key(&self) -> Result<String> {
        let go_mod = self.file("go.mod")?;
        let mut key = self.name.to_owned();
        for (word, path) in self.keyed_by {
            let version = required_version(go_mod, path)?;
            key.push_str(&format!(
                "{}{word}{version}",
                if word.is_empty() { "-" } else { "" }
            ));
        }
        Ok(key)
    }

    fn file(&self, name: &str) -> Result<&'static str> {
        let found = self.files.iter().find(|(file, _)| *file == name);
        found
            .map(|(_, text)| *text)
            .with_context(|| format!("no {name} in {}", self.name))
    }

    fn build(&self, dir: &Path) -> Result<()> {
        let (src, bin) = (dir.join("src"), dir.join("bin"));
        fs::create_dir_all(&src).context("make the source directory")?;
        fs::create_dir_all(&bin).context("make the program directory")?;
        for (name, text) in self.files {
            fs::write(src.join(name), text).with_context(|| format!("write {name}"))?;
        }
        self.go(
            &src,
            &[
                ["-o", &format!("{}/", bin.display())].as_slice(),
                self.packages,
            ]
            .concat(),
        )?;
        for (package, program) in self.renamed {
            self.go(&src, &["-o", &bin.join(program).to_string_lossy(), package])?;
        }
        fs::remove_dir_all(&src).context("remove the sources")
    }

    fn go(&self, src: &Path, args: &[&str]) -> Result<()> {
        if args.len() == 2 {
            return Ok(());
        }
        let mut flags = "-s -w".to_owned();
        if self.name == "kubernetes" {
            let version = required_version(self.file("go.mod")?, "k8s.io/kubernetes")?;
            let (major, minor) = version
                .trim_start_matches('v')
                .split_once('.')
                .and_then(|(major, rest)| Some((major, rest.split_once('.')?.0)))
                .with_context(|| format!("version {version}"))?;
            let at = "k8s.io/component-base/version";
            flags.push_str(&format!(" -X {at}.gitVersion={version}"));
            flags.push_str(&format!(
                " -X {at}.gitMajor={major} -X {at}.gitMinor={minor}"
            ));
        }
        Run::new("go")
            .dir(src)
            .env("CGO_ENABLED", "0")
            .args(["build", "-trimpath", "-ldflags", &flags])
            .args(args)
            .deadline(Duration::from_secs(3600))
            .done()
    }
}

/// The version of `module` that a go.mod requires.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Result<&'a str> {
    go_mod
        .lines()
        .map(|line| line.trim().trim_start_matches("require "))
        .find_map(|line| {
            line.strip_prefix(module)?
                .strip_prefix(' ')?
                .split_whitespace()
                .next()
        })
        .with_context(|| format!("go.mod does not require {module}"))
}

const MODULES: [GoModule; 3] = [
    GoModule {
        name: "kubernetes",
        keyed_by: &[("", "k8s.io/kubernetes")],
        files: &[
            ("go.mod", include_str!("../../tools/kubernetes/go.mod")),
            ("go.sum", include_str!("../../tools/kubernetes/go.sum")),
            ("tools.go", include_str!("../../tools/kubernetes/tools.go")),
        ],
        packages: &[
            "k8s.io/kubernetes/cmd/kube-apiserver",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-scheduler",
            "k8s.io/kubernetes/cmd/kubelet",
            "k8s.io/kubernetes/cmd/kubectl",
            "k8s.io/kubernetes/cmd/kube-proxy",
        ],
        renamed: &[],
        cost: "once; usually 9 min on 2 cores",
    },
    GoModule {
        name: "runtime",
        keyed_by: &[
            ("-containerd-", "github.com/containerd/containerd/v2"),
            ("-helm-", "helm.sh/helm/v4"),
        ],
        files: &[
            ("go.mod", include_str!("../../tools/runtime/go.mod")),
            ("go.sum", include_str!("../../tools/runtime/go.sum")),
            ("tools.go", include_str!("../../tools/runtime/tools.go")),
        ],
        packages: &[
            "github.com/containerd/containerd/v2/cmd/containerd",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            "github.com/containerd/containerd/v2/cmd/ctr",
            "helm.sh/helm/v4/cmd/helm",
        ],
        renamed: &[("go.etcd.io/etcd/server/v3", "etcd")],
        cost: "once; usually 5 min on 2 cores",
    },
    GoModule {
        name: "dns",
        keyed_by: &[("-coredns-", "github.com/coredns/coredns")],
        files: &[
            ("go.mod", include_str!("../../tools/dns/go.mod")),
            ("go.sum", include_str!("../../tools/dns/go.sum")),
            ("main.go", include_str!("../../tools/dns/main.go")),
        ],
        packages: &[],
        renamed: &[(".", "coredns")],
        cost: "once; usually 2 min on 2 cores",
    },
];

/// Debian packages that both tiers need on the host.
pub const PACKAGES: &[&str] = &[
    "busybox-static",
    "conntrack",
    "containernetworking-plugins",
    "cpio",
    "e2fsprogs",
    "ethtool",
    "iproute2",
    "iptables",
    "kmod",
    "nftables",
    "runc",
    "socat",
    "xz-utils",
];

/// Debian packages that only the emulated tier needs.
pub const PACKAGES_EMULATED: &[&str] = &[
    "debian-archive-keyring",
    "dosfstools",
    "fdisk",
    "grub-common",
    "grub-efi-amd64-bin",
    "mmdebstrap",
    "mtools",
    "qemu-system-x86",
    "qemu-utils",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_key_follows_the_required_versions() {
        let keys: Vec<String> = MODULES.iter().map(|module| module.key().unwrap()).collect();
        assert!(keys[0].starts_with("kubernetes-v1."), "{keys:?}");
        assert!(keys[1].starts_with("runtime-containerd-v2."), "{keys:?}");
        assert!(keys[1].contains("-helm-v4."), "{keys:?}");
        assert!(keys[2].starts_with("dns-coredns-v1."), "{keys:?}");
    }

    #[test]
    fn a_module_path_with_the_same_prefix_is_not_confused_with_the_required_one() {
        let go_mod =
            "require (\n\tk8s.io/kubernetes-more v9.0.0\n\tk8s.io/kubernetes v1.2.3 // x\n)";
        assert_eq!(
            required_version(go_mod, "k8s.io/kubernetes").unwrap(),
            "v1.2.3"
        );
        assert!(required_version(go_mod, "k8s.io/kube").is_err());
    }
}
