//! The disk that cloud-init reads at the guest's first boot: data source NoCloud of cloud-init's
//! documentation, a FAT file system with the label CIDATA.
//!
//! The image is a function of the configuration alone, to the bit: the target of a migration makes it
//! again, and a guest that has it mounted must not notice.

use std::io::{self, Cursor, Write as _};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use bascule_devices::disk::{AlwaysOpen, Disk};
use bascule_ipc::vm::{CloudInit, VmConfig};
use bascule_types::{Bytes, ExtentRun, Lba};
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// The name that the guest's serial number is made of; a user's disks cannot have it, because their
/// names do not begin with `boot-`.
pub(super) const NAME: &str = "boot-cloud-init";

/// The disk of a configuration with these contents, in memory that nobody can write.
///
/// # Errors
/// When the contents do not fit on the disk, or the host has no memory for it.
pub(super) fn disk(config: &VmConfig, contents: &CloudInit) -> anyhow::Result<Disk> {
    let image = image(config, contents)?;
    let file = sealed(&image).context("write it to memory")?;
    let run = ExtentRun {
        start: Lba(0),
        length: Bytes(IMAGE_BYTES as u64),
    };
    let size = Bytes(IMAGE_BYTES as u64);
    Ok(Disk::new(file, &[run], size, Arc::new(AlwaysOpen))?)
}

pub(crate) fn image(config: &VmConfig, contents: &CloudInit) -> anyhow::Result<Vec<u8>> {
    let meta_data = meta_data(config, contents);
    let user_data = match contents.user_data.as_str() {
        // Without the file, cloud-init takes the disk for another program's.
        "" => EMPTY_USER_DATA,
        given => given,
    };
    let network_config = contents.network_config.as_deref();
    let files = [
        ("meta-data", Some(meta_data.as_str())),
        ("user-data", Some(user_data)),
        ("network-config", network_config),
    ];
    let length: usize = files.iter().flat_map(|(_, text)| *text).map(str::len).sum();
    ensure!(
        length <= FILES_BYTES_MAX,
        "{length} bytes of user data, network configuration and keys are more than the {FILES_BYTES_MAX} of its disk"
    );
    let mut image = vec![0; IMAGE_BYTES];
    let format = FormatVolumeOptions::new()
        .volume_label(*b"CIDATA     ")
        .volume_id(VOLUME_ID);
    fatfs::format_volume(Cursor::new(image.as_mut_slice()), format).context("format it")?;
    let volume = FileSystem::new(Cursor::new(image.as_mut_slice()), FsOptions::new())?;
    for (name, text) in files {
        if let Some(text) = text {
            let mut file = volume.root_dir().create_file(name).context(name)?;
            file.write_all(text.as_bytes()).context(name)?;
        }
    }
    volume.unmount()?;
    Ok(image)
}

/// In JSON, which is YAML, so that nothing in a key or a name can add a field.
fn meta_data(config: &VmConfig, contents: &CloudInit) -> String {
    let host_name = config.name.rsplit('/').next().unwrap_or_default();
    let mut document = serde_json::json!({
        "instance-id": config.uid.to_string(),
        "local-hostname": host_name,
    });
    if !contents.ssh_authorized_keys.is_empty() {
        document["public-keys"] = contents.ssh_authorized_keys.clone().into();
    }
    format!("{document:#}\n")
}

/// A file in memory with these bytes for good.
fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = std::fs::File::from(memfd_create("cloud-init", flags)?);
    file.write_all(bytes)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// A configuration that asks for nothing.
pub(crate) const EMPTY_USER_DATA: &str = "#cloud-config\n{}\n";
/// The disk's size, the same for all guests.
const IMAGE_BYTES: usize = 2 << 20;
/// What the files may have together: the API's limits, 131072 + 32768 + 32 x 4096 characters, with up to 4
/// bytes each and escapes, fit for everything but pathological texts.
const FILES_BYTES_MAX: usize = IMAGE_BYTES - (256 << 10);
/// Any, but the same wherever the disk is made.
const VOLUME_ID: u32 = 0xba5c_u32 << 16 | 1;

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::process::Command;

    use bascule_types::VmUid;
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::process::testing;

    fn contents() -> CloudInit {
        CloudInit {
            user_data: "#cloud-config\npackages: [vim]\n".to_owned(),
            network_config: Some("version: 2\n".to_owned()),
            ssh_authorized_keys: vec!["ssh-ed25519 AAAA \"key\": of\tada".to_owned()],
        }
    }

    fn read(image: &[u8], name: &str) -> String {
        let volume = FileSystem::new(Cursor::new(image.to_vec()), FsOptions::new()).unwrap();
        let mut text = String::new();
        let mut file = volume.root_dir().open_file(name).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn it_holds_what_the_user_wrote_and_the_identity() {
        let config = testing::config();
        let image = image(&config, &contents()).unwrap();
        assert_eq!(read(&image, "user-data"), contents().user_data);
        assert_eq!(read(&image, "network-config"), "version: 2\n");
        let meta: serde_json::Value = serde_json::from_str(&read(&image, "meta-data")).unwrap();
        let name = config.name.rsplit('/').next().unwrap();
        assert_eq!(meta["instance-id"], config.uid.to_string());
        assert_eq!(meta["local-hostname"], name);
        assert_eq!(meta["public-keys"][0], contents().ssh_authorized_keys[0]);
    }

    #[test]
    fn a_guest_without_user_data_gets_an_empty_one_and_no_network_configuration() {
        let image = image(&testing::config(), &CloudInit::default()).unwrap();
        assert_eq!(read(&image, "user-data"), EMPTY_USER_DATA);
        assert!(!read(&image, "meta-data").contains("public-keys"));
        let volume = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        assert!(volume.root_dir().open_file("network-config").is_err());
    }

    /// A guest that migrates between two releases has the disk mounted: the same contents are the same
    /// bytes in every release.
    #[test]
    fn its_bytes_are_those_of_every_release() {
        let config = VmConfig {
            uid: VmUid::from_bytes([1; 16]),
            ..testing::config()
        };
        let image = image(&config, &contents()).unwrap();
        let hex: String = Sha256::digest(&image)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "d1a691bab9d01e945e2fd341dfb52cdcb678951eb7e8937e39b136a45307605d"
        );
    }

    /// As cloud-init does: it asks blkid for file systems with this label.
    #[test]
    fn blkid_finds_the_label_and_the_file_system_that_cloud_init_looks_for() {
        let image = image(&testing::config(), &contents()).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&image).unwrap();
        let tags = Command::new("/sbin/blkid")
            .args(["-p", "-o", "export"])
            .arg(file.path())
            .output()
            .unwrap();
        let tags = String::from_utf8(tags.stdout).unwrap();
        let has = |tag: &str| tags.lines().any(|line| line == tag);
        assert!(has("LABEL=CIDATA") && has("TYPE=vfat"), "{tags}");
    }

    #[test]
    fn contents_at_the_apis_limits_fit_and_larger_ones_are_refused() {
        let most = CloudInit {
            user_data: format!("#{}", "é".repeat(131_071)),
            network_config: Some("é".repeat(32_768)),
            ssh_authorized_keys: vec!["\"".repeat(4096); 32],
        };
        assert!(image(&testing::config(), &most).is_ok());
        let more = CloudInit {
            user_data: format!("#{}", "x".repeat(IMAGE_BYTES)),
            ..CloudInit::default()
        };
        let error = image(&testing::config(), &more).unwrap_err();
        assert!(error.to_string().contains("are more than"), "{error}");
    }

    #[test]
    fn nobody_can_write_it() {
        let mut file = std::fs::File::from(sealed(b"cloud").unwrap());
        let error = file.write_all(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
