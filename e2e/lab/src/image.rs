//! Container images without a container tool: an OCI layout in a tar file, from files on disk.
//!
//! # Guarantees
//! The same files give the same bytes: entries are sorted, times are zero, owners are root.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::cache::cached;

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageFile {
    /// Path in the image, without a leading slash.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: Content,
}

/// What is in an [`ImageFile`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variant names say all")]
pub enum Content {
    /// A copy of this file.
    File(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
    /// A symbolic link to this target.
    Link(String),
    Directory,
}

/// An image of one layer.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Image {
    /// Name with tag, as in a pod's `image`. It needs a domain, otherwise the runtime prepends one.
    pub name: String,
    pub files: Vec<ImageFile>,
    /// Entry point; may be empty.
    pub entrypoint: Vec<String>,
}

impl Image {
    /// The project's image: every program of `bin_dir` in /usr/bin, /etc/passwd and the usual directories.
    pub fn of_programs(name: &str, bin_dir: &Path) -> Result<Self> {
        let mut files = skeleton();
        let entries =
            fs::read_dir(bin_dir).with_context(|| format!("list {}", bin_dir.display()))?;
        for entry in entries {
            let path = entry.context("list the programs")?.path();
            let program = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !path.is_file() || program.contains('.') {
                continue;
            }
            files.push(ImageFile {
                path: format!("usr/bin/{program}"),
                mode: 0o755,
                content: Content::File(path),
            });
        }
        ensure!(
            files.len() > skeleton().len(),
            "no program in {}",
            bin_dir.display()
        );
        Ok(Self {
            name: name.to_owned(),
            files,
            entrypoint: Vec::new(),
        })
    }

    /// The lab's pause image: busybox that sleeps without end. Test pods use it as well.
    pub fn pause() -> Self {
        let mut files = skeleton();
        files.push(ImageFile {
            path: "bin/busybox".to_owned(),
            mode: 0o755,
            content: Content::File("/bin/busybox".into()),
        });
        files.extend(APPLETS.iter().map(|applet| ImageFile {
            path: format!("bin/{applet}"),
            mode: 0o777,
            content: Content::Link("busybox".to_owned()),
        }));
        let entrypoint = ["/bin/busybox", "sleep", "infinity"]
            .map(str::to_owned)
            .to_vec();
        Self {
            name: PAUSE_IMAGE.to_owned(),
            files,
            entrypoint,
        }
    }

    /// Writes the image to `out` and returns its digest (`sha256:...`, of the manifest).
    pub fn write(&self, out: &Path) -> Result<String> {
        let layer_path = out.with_extension("layer");
        let layer = self.write_layer(&layer_path)?;
        let config = serde_json::to_vec(&self.config(&layer)).context("serialize the config")?;
        let config_blob = Blob::of_bytes(&config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config_blob.descriptor("application/vnd.oci.image.config.v1+json"),
            "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar")],
        });
        let manifest = serde_json::to_vec(&manifest).context("serialize the manifest")?;
        let manifest_blob = Blob::of_bytes(&manifest);
        let index =
            serde_json::to_vec(&self.index(&manifest_blob)).context("serialize the index")?;

        let file = File::create(out).with_context(|| format!("create {}", out.display()))?;
        let mut tar = Builder::new(BufWriter::new(file));
        append(
            &mut tar,
            "oci-layout",
            0o644,
            br#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        append(&mut tar, "index.json", 0o644, &index)?;
        append(&mut tar, &config_blob.path(), 0o644, &config)?;
        append(&mut tar, &manifest_blob.path(), 0o644, &manifest)?;
        append_file(&mut tar, &layer.path(), 0o644, &layer_path)?;
        tar.into_inner()
            .and_then(|mut out| out.flush())
            .context("finish the image")?;
        fs::remove_file(&layer_path).context("remove the layer's own file")?;
        Ok(manifest_blob.digest())
    }

    fn write_layer(&self, path: &Path) -> Result<Blob> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut tar = Builder::new(BufWriter::new(file));
        // Sorted by path, each once.
        let files: BTreeSet<&ImageFile> = self.files.iter().collect();
        for file in files {
            match &file.content {
                Content::File(source) => append_file(&mut tar, &file.path, file.mode, source)?,
                Content::Bytes(bytes) => append(&mut tar, &file.path, file.mode, bytes)?,
                Content::Link(target) => {
                    let mut header = header(file.mode, 0);
                    header.set_entry_type(EntryType::Symlink);
                    tar.append_link(&mut header, &file.path, target)
                        .context("add a link")?;
                }
                Content::Directory => {
                    let mut header = header(file.mode, 0);
                    header.set_entry_type(EntryType::Directory);
                    let path = format!("{}/", file.path);
                    tar.append_data(&mut header, path, io::empty())
                        .context("add a directory")?;
                }
            }
        }
        tar.into_inner()
            .and_then(|mut out| out.flush())
            .context("finish the layer")?;
        Blob::of_file(path)
    }

    fn config(&self, layer: &Blob) -> Value {
        json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/bin:/bin"],
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.digest()]},
        })
    }

    fn index(&self, manifest: &Blob) -> Value {
        let mut descriptor = manifest.descriptor(MANIFEST_TYPE);
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        descriptor["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": tag,
        });
        json!({"schemaVersion": 2, "manifests": [descriptor]})
    }
}

/// Directories and accounts that programs expect.
fn skeleton() -> Vec<ImageFile> {
    let directory = |path: &str, mode| ImageFile {
        path: path.to_owned(),
        mode,
        content: Content::Directory,
    };
    let text = |path: &str, text: &str| ImageFile {
        path: path.to_owned(),
        mode: 0o644,
        content: Content::Bytes(text.into()),
    };
    vec![
        directory("etc", 0o755),
        directory("tmp", 0o1777),
        directory("usr", 0o755),
        directory("usr/bin", 0o755),
        directory("bin", 0o755),
        text(
            "etc/passwd",
            "root:x:0:0::/:\nnonroot:x:65532:65532::/tmp:\n",
        ),
        text("etc/group", "root:x:0:\nnonroot:x:65532:\n"),
    ]
}

/// SHA-256 and size of a blob.
struct Blob {
    hex: String,
    size: u64,
}

impl Blob {
    fn of_bytes(bytes: &[u8]) -> Self {
        // A usize fits in a u64 on every platform that has KVM.
        Self {
            hex: hex(&Sha256::digest(bytes)),
            size: bytes.len() as u64,
        }
    }

    fn of_file(path: &Path) -> Result<Self> {
        let (hex, size) = sha256_file(path)?;
        Ok(Self { hex, size })
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.hex)
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.hex)
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest(), "size": self.size})
    }
}

/// SHA-256 of a file, in hexadecimal, and its size.
pub fn sha256_file(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let count = file
            .read(&mut buffer)
            .with_context(|| format!("read {}", path.display()))?;
        if count == 0 {
            return Ok((hex(&sha256.finalize()), size));
        }
        sha256.update(&buffer[..count]);
        size += count as u64;
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn header(mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

fn append(tar: &mut Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = header(mode, bytes.len() as u64);
    tar.append_data(&mut header, path, bytes)
        .with_context(|| format!("add {path}"))
}

fn append_file(tar: &mut Builder<impl Write>, path: &str, mode: u32, source: &Path) -> Result<()> {
    let file = File::open(source).with_context(|| format!("open {}", source.display()))?;
    let size = file
        .metadata()
        .with_context(|| format!("stat {}", source.display()))?
        .len();
    let mut header = header(mode, size);
    tar.append_data(&mut header, path, file.take(size))
        .with_context(|| format!("add {path}"))
}

/// The pause image's archive, keyed by the busybox in it.
pub(crate) fn pause_archive() -> Result<PathBuf> {
    let (busybox, _) = sha256_file("/bin/busybox".as_ref())?;
    let key = format!("pause-{}", &busybox[..16]);
    let dir = cached(&key, "making the pause image", |dir| {
        Image::pause().write(&dir.join("pause.tar")).map(drop)
    })?;
    Ok(dir.join("pause.tar"))
}

/// Name of the lab's pause image, which has busybox in it.
pub const PAUSE_IMAGE: &str = "lab.bascule.dev/busybox:1";
/// Name of the project's image in the lab.
pub const BASCULE_IMAGE: &str = "lab.bascule.dev/bascule:dev";

const APPLETS: &[&str] = &[
    "cat", "chmod", "cp", "date", "dd", "echo", "env", "grep", "httpd", "id", "ip", "kill", "ln",
    "ls", "mkdir", "mount", "mv", "nc", "nsenter", "nslookup", "ping", "ps", "rm", "sed", "setsid",
    "sh", "sleep", "sync", "tail", "test", "touch", "true", "umount", "uname", "unshare", "wget",
];

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bin: &Path) -> Image {
        fs::write(bin.join("bascule-node"), "node").unwrap();
        fs::write(bin.join("bascule-vm"), "vm").unwrap();
        fs::write(bin.join("notes.d"), "no program").unwrap();
        Image::of_programs("lab.bascule.dev/x:7", bin).unwrap()
    }

    #[test]
    fn the_same_files_give_the_same_bytes_whatever_their_times_and_order() {
        let (bin, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (first, second) = (out.path().join("1.tar"), out.path().join("2.tar"));
        let mut image = sample(bin.path());
        let digest = image.write(&first).unwrap();
        File::open(bin.path().join("bascule-vm"))
            .and_then(|file| file.set_modified(std::time::UNIX_EPOCH))
            .unwrap();
        image.files.reverse();
        assert_eq!(image.write(&second).unwrap(), digest);
        assert_eq!(fs::read(first).unwrap(), fs::read(second).unwrap());
    }

    #[test]
    fn another_program_gives_another_digest() {
        let (bin, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let image = sample(bin.path());
        let before = image.write(&out.path().join("1.tar")).unwrap();
        fs::write(bin.path().join("bascule-vm"), "vm 2").unwrap();
        assert_ne!(image.write(&out.path().join("1.tar")).unwrap(), before);
    }

    #[test]
    fn every_blob_is_named_by_its_digest() {
        let (bin, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = out.path().join("image.tar");
        let digest = sample(bin.path()).write(&path).unwrap();
        let mut archive = tar::Archive::new(File::open(&path).unwrap());
        let mut blobs = 0;
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            if let Some(hash) = name.strip_prefix("blobs/sha256/") {
                assert_eq!(hash, hex(&Sha256::digest(&bytes)));
                blobs += 1;
            }
            if name == "index.json" {
                let index: Value = serde_json::from_slice(&bytes).unwrap();
                let manifest = &index["manifests"][0];
                assert_eq!(manifest["digest"], digest.as_str());
                assert_eq!(
                    manifest["annotations"]["io.containerd.image.name"],
                    "lab.bascule.dev/x:7"
                );
            }
        }
        assert_eq!(blobs, 3, "config, manifest and layer");
    }

    #[test]
    fn a_directory_without_programs_is_refused() {
        let bin = tempfile::tempdir().unwrap();
        assert!(Image::of_programs("lab.bascule.dev/x:7", bin.path()).is_err());
    }
}
