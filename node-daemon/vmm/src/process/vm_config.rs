//! Reading and checking `config.json`.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use bascule_ipc::vm::{DiskSource, ImageSource, StartMode, VmConfig};
use serde::Deserialize;

/// Longest configuration: a hundred disks and interfaces with long names, and cloud-init's disk full of
/// characters that JSON escapes.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// The configuration at `path`.
pub(super) fn read(path: &Path) -> anyhow::Result<VmConfig> {
    let in_file = || format!("read the configuration {}", path.display());
    let length = std::fs::metadata(path).with_context(in_file)?.len();
    ensure!(
        length <= CONFIG_BYTES_MAX,
        "configuration of {length} bytes is too long"
    );
    let text = std::fs::read(path).with_context(in_file)?;
    parse(&text).with_context(in_file)
}

fn parse(text: &[u8]) -> anyhow::Result<VmConfig> {
    /// The field that is read first.
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let head: Head = serde_json::from_slice(text)?;
    let known = VmConfig::VERSION;
    ensure!(
        head.version == known,
        "version {} is not known, only {known}",
        head.version
    );
    let config: VmConfig = serde_json::from_slice(text)?;
    check(&config)?;
    Ok(config)
}

/// Checks what the types do not.
fn check(config: &VmConfig) -> anyhow::Result<()> {
    if config.home.is_some() {
        return Ok(());
    }
    for disk in &config.disks {
        if let DiskSource::Volume { .. } = disk.source {
            bail!("disks: {:?} is on a volume, but home names none", disk.name);
        }
    }
    for image in [Some(&config.boot.kernel), config.boot.initrd.as_ref()]
        .into_iter()
        .flatten()
    {
        if let ImageSource::Volume { disk, .. } = image {
            bail!("boot: {disk:?} is on a volume, but home names none");
        }
    }
    if matches!(config.start, StartMode::Restore) {
        bail!("start: a saved state is on a volume, but home names none");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"version":1,"uid":"6fa459ea-ee8a-4ca4-894e-db77e160355e",
        "name":"default/web","cpus":1,"memory":16777216,
        "boot":{"kernel":{"File":{"path":"/k"}},"initrd":null,"cmdline":"quiet"},
        "disks":[],"interfaces":[],"home":null,"start":"Boot","tls_dir":null}"#;

    #[test]
    fn the_first_versions_document_is_read() {
        let config = parse(MINIMAL.as_bytes()).unwrap();
        assert_eq!((config.name.as_str(), config.cpus), ("default/web", 1));
    }

    #[test]
    fn a_newer_version_is_refused_whatever_else_it_holds() {
        let error = parse(br#"{"version":2,"shape":"new"}"#).unwrap_err();
        assert_eq!(error.to_string(), "version 2 is not known, only 1");
    }

    #[test]
    fn a_volume_disk_without_a_home_is_refused_by_name() {
        let disk = r#"[{"name":"root","source":{"Volume":{"disk":"default/root"}}}]"#;
        let text = MINIMAL.replace("\"disks\":[]", &format!("\"disks\":{disk}"));
        let error = parse(text.as_bytes()).unwrap_err();
        assert!(error.to_string().starts_with("disks: \"root\""), "{error}");
    }
}
