//! Bascule in a lab: its image, and its installation with helm as a user does it. `make image` builds the programs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::image::{BASCULE_IMAGE, Content, Image, ImageFile};
use crate::lab::Lab;
use crate::names::VM_BRIDGE;
use crate::progress::step;
use crate::state::Tier;

/// Writes the project's image from the programs, the firmware and its licence in `directory`; other files there are
/// left out. Returns the digest.
pub fn pack(name: &str, directory: &Path, out: &Path) -> Result<String> {
    let mut image = Image::of_programs(name, directory)?;
    image.files.retain(|file| match &file.content {
        Content::File(path) => path
            .file_name()
            .is_some_and(|name| PROGRAMS.iter().any(|known| name == *known)),
        _ => true,
    });
    let licence = directory.join("bascule-firmware.copyright");
    let there = licence.is_file();
    ensure!(there, "{} is missing", licence.display());
    image.files.push(ImageFile {
        path: "usr/share/doc/bascule-firmware/copyright".to_owned(),
        mode: 0o644,
        content: Content::File(licence),
    });
    for program in PROGRAMS {
        let there = image
            .files
            .iter()
            .any(|file| file.path == format!("usr/bin/{program}"));
        ensure!(there, "{} has no {program}", directory.display());
    }
    step("packing the image", || image.write(out))
}

impl Lab {
    /// `helm upgrade --install` of this checkout's chart with the lab's image, bridge `lan` and watchdog; waits
    /// until everything is ready. `more` is further arguments for helm, values mostly.
    pub fn install_bascule(&self, more: &[&str]) -> Result<()> {
        let chart = checkout()?.join("charts/bascule");
        let (repository, tag) = BASCULE_IMAGE
            .rsplit_once(':')
            .context("the image has a tag")?;
        let watchdog = match self.state().tier {
            Tier::Native => "",
            Tier::Emulated => "/dev/watchdog",
        };
        let values = [
            format!("image.repository={repository}"),
            format!("image.tag={tag}"),
            format!("node.watchdogDevice={watchdog}"),
            format!("node.bridges.lan={VM_BRIDGE}"),
        ];
        let sets = values.iter().flat_map(|value| ["--set", value.as_str()]);
        step("installing the chart", || {
            self.helm_run()?
                .args(["upgrade", "--install", "bascule"])
                .arg(&chart)
                .args([
                    "--namespace",
                    NAMESPACE,
                    "--create-namespace",
                    "--wait",
                    "--timeout=8m",
                ])
                .args(sets)
                .args(more)
                .done()
        })
        .inspect_err(|_| self.print_logs())
    }
}

impl Lab {
    /// Prints Bascule's objects and the logs of its pods to standard error, if the API server responds.
    pub(crate) fn print_bascule(&self) {
        let show = [
            "get",
            "vm,sv,vmmig,failover,pod,node",
            "--all-namespaces",
            "-o",
            "wide",
        ];
        let pods = "-lapp.kubernetes.io/name=bascule";
        let logs = ["logs", "-n", NAMESPACE, pods, "--prefix", "--tail=60"];
        for args in [&show[..], &logs[..]] {
            let said = self.kubectl(args);
            let said = said.unwrap_or_else(|error| format!("{error:#}"));
            eprintln!("==> kubectl {} <==\n{said}", args.join(" "));
        }
    }
}

/// Namespace that the chart is installed to.
pub const NAMESPACE: &str = "bascule-system";

/// The checkout that this program was built from, or the working directory's.
fn checkout() -> Result<PathBuf> {
    let here = std::env::current_dir().context("find the working directory")?;
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut candidates = here.ancestors().chain(built_from.ancestors());
    candidates
        .find(|dir| dir.join("charts/bascule/Chart.yaml").is_file())
        .map(Path::to_owned)
        .context("run this in a checkout of Bascule")
}

const PROGRAMS: &[&str] = &[
    "bascule-firmware",
    "bascule-hold",
    "bascule-import",
    "bascule-node",
    "bascule-operator",
    "bascule-vm",
    "bascule-volume",
    "bascule-watchdog",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_has_bascules_programs_and_nothing_else_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("image.tar");
        for program in PROGRAMS
            .iter()
            .chain(&["bascule-firmware.copyright", "lab"])
        {
            std::fs::write(dir.path().join(program), program).unwrap();
        }
        let digest = pack("lab.bascule.dev/x:1", dir.path(), &out).unwrap();
        std::fs::remove_file(dir.path().join("lab")).unwrap();
        assert_eq!(
            pack("lab.bascule.dev/x:1", dir.path(), &out).unwrap(),
            digest
        );
        std::fs::remove_file(dir.path().join("bascule-vm")).unwrap();
        let error = pack("lab.bascule.dev/x:1", dir.path(), &out).unwrap_err();
        assert!(error.to_string().contains("bascule-vm"));
        std::fs::remove_file(dir.path().join("bascule-firmware.copyright")).unwrap();
        let error = pack("lab.bascule.dev/x:1", dir.path(), &out).unwrap_err();
        assert!(error.to_string().contains("bascule-firmware.copyright"));
    }

    #[test]
    fn the_chart_is_found_from_the_checkout_that_built_this() {
        assert!(checkout().unwrap().join("e2e/lab/src/project.rs").is_file());
    }
}
