//! Parses a VirtualMachine document and resolves it to a [`VmSpec`] and the disks that it needs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use bascule_crds::{Source, VirtualMachine};
use bascule_image::{INITRD_BYTES_MAX, KERNEL_BYTES_MAX};
use bascule_node_api::cloud_init::{CloudInitSecrets, inline_texts};
use bascule_node_api::command::{DiskRef, ImportSource, Interface, VmSpec};
use bascule_types::{Bytes, DiskRole, ImageDigest, OnError, OnPanic, RowName, VmUid};
use sha2::{Digest, Sha256};

use super::schema::check_fields;

/// A disk that the document needs on the volume.
#[derive(Debug)]
pub(crate) struct WantedDisk {
    /// The path of the field that says where its contents come from.
    pub(crate) field: String,
    pub(crate) row: RowName,
    pub(crate) role: DiskRole,
    /// Size and contents of a new disk; none for a kept disk.
    pub(crate) fill: Option<(Bytes, ImportSource)>,
}

/// A validated document with its names resolved.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) spec: VmSpec,
    pub(crate) row: RowName,
    pub(crate) digest: [u8; 32],
    pub(crate) disks: Vec<WantedDisk>,
}

impl Document {
    /// Reads a document; the error lists every invalid field.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let vm: VirtualMachine = serde_saphyr::from_str(text).context("not a VirtualMachine")?;
        check_fields(&serde_saphyr::from_str(text).context("not a document")?)?;
        if let Err(errors) = vm.spec.check(&vm.metadata) {
            let lines: Vec<String> = errors.iter().map(|error| format!("  {error}")).collect();
            bail!("the document cannot be carried out:\n{}", lines.join("\n"));
        }
        let name = vm
            .metadata
            .name
            .clone()
            .context("metadata.name is missing")?;
        let namespace = vm
            .metadata
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned());
        let digest: [u8; 32] =
            Sha256::digest(serde_json::to_vec(&vm.spec).context("write the spec")?).into();
        let row = RowName::new(format!("{namespace}/{name}"))?;
        let disks = wanted_disks(&vm, &namespace, &name)?;
        let spec = resolve(&vm, &namespace, &name)?;
        Ok(Self {
            spec,
            row,
            digest,
            disks,
        })
    }
}

fn resolve(vm: &VirtualMachine, namespace: &str, name: &str) -> Result<VmSpec> {
    let image = |disk: &str| format!("{namespace}/{name}.{disk}");
    let uid = document_uid(namespace, name);
    let mut interfaces = Vec::new();
    for (index, interface) in vm.spec.interfaces.iter().enumerate() {
        let mac = match &interface.mac {
            Some(text) => {
                parse_mac(text).with_context(|| format!("spec.interfaces[{index}].mac"))?
            }
            None => derived_mac(uid, index),
        };
        interfaces.push(Interface {
            network: interface.bridge.clone(),
            mac,
        });
    }
    let disks = vm.spec.disks.iter().map(|disk| {
        let row = match &disk.existing {
            Some(kept) => format!("{namespace}/{}", kept.name),
            None => format!("{namespace}/{name}.{}", disk.name),
        };
        DiskRef {
            name: disk.name.clone(),
            row,
            on_error: match disk.on_error {
                bascule_crds::OnError::Report => OnError::Report,
                bascule_crds::OnError::Pause => OnError::Pause,
            },
            read_only: disk.read_only,
        }
    });
    let asked = vm.spec.cloud_init.as_ref();
    let cloud_init = asked
        .map(|asked| asked.resolve(|_| Err(NO_SECRETS.to_owned())))
        .transpose()?;
    Ok(VmSpec {
        uid,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        volume: vm.spec.volume.clone(),
        cpus: u8::try_from(vm.spec.cpu.cores).context("spec.cpu.cores")?,
        memory: Bytes(vm.spec.memory.to_bytes().context("spec.memory")?),
        kernel: vm.spec.boot.kernel.as_ref().map(|_| image(KERNEL)),
        initrd: vm.spec.boot.initrd.as_ref().map(|_| image(INITRD)),
        cmdline: vm.spec.boot.cmdline.clone(),
        disks: disks.collect(),
        interfaces,
        shutdown_timeout_ms: u64::try_from(
            (vm.spec.availability.migration.shutdown_timeout)
                .to_std()?
                .as_millis(),
        )
        .ok(),
        cloud_init: cloud_init.as_ref().map(inline_texts),
        cloud_init_secrets: CloudInitSecrets::default(),
        guest_agent: vm.spec.guest_agent,
        on_panic: match vm.spec.on_panic {
            bascule_crds::OnPanic::Restart => OnPanic::Restart,
            bascule_crds::OnPanic::Leave => OnPanic::Leave,
        },
    })
}

fn wanted_disks(vm: &VirtualMachine, namespace: &str, name: &str) -> Result<Vec<WantedDisk>> {
    let mut wanted = Vec::new();
    if let Some(kernel) = &vm.spec.boot.kernel {
        wanted.push(WantedDisk {
            field: "spec.boot.kernel".to_owned(),
            row: RowName::new(format!("{namespace}/{name}.{KERNEL}"))?,
            role: DiskRole::Kernel,
            fill: Some((
                Bytes(KERNEL_BYTES_MAX),
                import_source(kernel, "spec.boot.kernel")?,
            )),
        });
    }
    if let Some(initrd) = &vm.spec.boot.initrd {
        wanted.push(WantedDisk {
            field: "spec.boot.initrd".to_owned(),
            row: RowName::new(format!("{namespace}/{name}.{INITRD}"))?,
            role: DiskRole::Initrd,
            fill: Some((
                Bytes(INITRD_BYTES_MAX),
                import_source(initrd, "spec.boot.initrd")?,
            )),
        });
    }
    for (index, disk) in vm.spec.disks.iter().enumerate() {
        let at = || format!("spec.disks[{index}]");
        let kept = disk.existing.as_ref().map(|kept| kept.name.clone());
        let row = kept
            .clone()
            .unwrap_or_else(|| format!("{name}.{}", disk.name));
        let fill = match (&kept, &disk.size) {
            (None, Some(size)) => {
                let source = match &disk.source {
                    Some(source) => import_source(source, &format!("{}.source", at()))?,
                    None => ImportSource::Blank,
                };
                Some((Bytes(size.to_bytes().with_context(at)?), source))
            }
            _ => None,
        };
        wanted.push(WantedDisk {
            field: format!("{}.source", at()),
            row: RowName::new(format!("{namespace}/{row}")).with_context(at)?,
            role: DiskRole::Data,
            fill,
        });
    }
    Ok(wanted)
}

/// The source that is at `field`.
fn import_source(source: &Source, field: &str) -> Result<ImportSource> {
    match (&source.http, &source.host_file) {
        (Some(http), None) if http.authorization_from.is_some() => {
            bail!("{field}.http.authorizationFrom: {NO_SECRET_HEADERS}")
        }
        (Some(http), None) => Ok(ImportSource::Http {
            url: http.url.clone(),
            digest: ImageDigest::of(http.sha256.as_deref(), http.sha512.as_deref())
                .with_context(|| format!("{field}.http: set exactly one of sha256 and sha512"))?,
            ca_bundle: http.ca_bundle.clone(),
            authorization: None,
        }),
        (None, Some(file)) => Ok(ImportSource::HostFile {
            name: file.name.clone(),
        }),
        _ => bail!("{field}: set exactly one of http and hostFile"),
    }
}

/// A document has no UID without an API server: the UID is derived from namespace and name, so that the
/// document means the same VM on every node.
fn document_uid(namespace: &str, name: &str) -> VmUid {
    let digest = Sha256::digest(format!("bascule.dev/VirtualMachine/{namespace}/{name}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(digest.get(..16).unwrap_or(&[0; 16]));
    // A UUID of version 8, variant 1 (RFC 9562, 5.8).
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    VmUid::from_bytes(bytes)
}

/// A locally administered unicast address that stays the same for the VM's life.
fn derived_mac(uid: VmUid, index: usize) -> [u8; 6] {
    let digest = Sha256::digest([&uid.to_bytes()[..], &index.to_le_bytes()].concat());
    let mut mac = [0x02; 6];
    mac[1..].copy_from_slice(digest.get(..5).unwrap_or(&[0; 5]));
    mac
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .context("expected six bytes, such as 02:00:00:12:34:56")?;
        *byte = u8::from_str_radix(part, 16)
            .context("expected six hexadecimal bytes, such as 02:00:00:12:34:56")?;
    }
    if parts.next().is_some() {
        bail!("expected six bytes, such as 02:00:00:12:34:56");
    }
    Ok(mac)
}

const NO_SECRETS: &str = "there are no Secrets without Kubernetes: write the text into the document, whose file \
    may be readable by its owner only";
const NO_SECRET_HEADERS: &str = "there are no Secrets without Kubernetes: write user and password into the URL \
    of a document whose file is readable by its owner only, or fetch the image first and give it as a hostFile";
const KERNEL: &str = "boot-kernel";
const INITRD: &str = "boot-initrd";

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "
apiVersion: bascule.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web, namespace: shop}
spec:
  volume: gold
  cpu: {cores: 2}
  memory: 512Mi
  boot:
    kernel: {hostFile: {name: vmlinuz}}
    cmdline: console=ttyS0
  disks:
  - {name: data, size: 1Gi}
  - {name: old, existing: {name: db.data}}
  interfaces:
  - {name: lan, bridge: lan, mac: '02:00:00:12:34:56'}
";

    #[test]
    fn a_document_is_resolved_to_volume_names_and_numbers() {
        let document = Document::parse(DOCUMENT).unwrap();
        assert_eq!(document.row.as_str(), "shop/web");
        assert_eq!(document.spec.memory, Bytes::mib(512));
        assert_eq!(document.spec.interfaces[0].mac, [2, 0, 0, 0x12, 0x34, 0x56]);
        let rows: Vec<&str> = document
            .disks
            .iter()
            .map(|disk| disk.row.as_str())
            .collect();
        assert_eq!(
            rows,
            ["shop/web.boot-kernel", "shop/web.data", "shop/db.data"]
        );
        assert!(document.disks[2].fill.is_none());
        assert_eq!(
            Document::parse(DOCUMENT).unwrap().spec.uid,
            document.spec.uid
        );
    }

    #[test]
    fn the_error_names_an_invalid_field() {
        let text = DOCUMENT.replace("512Mi", "1Mi");
        let error = format!("{:#}", Document::parse(&text).unwrap_err());
        assert!(error.contains("spec.memory"), "{error}");
    }

    #[test]
    fn a_reference_to_a_secret_is_refused_with_its_field() {
        let from = "{userDataFrom: {secretKeyRef: {name: seed, key: user}}}";
        let text = format!("{DOCUMENT}  cloudInit: {from}\n");
        let error = format!("{:#}", Document::parse(&text).unwrap_err());
        let field = "spec.cloudInit.userDataFrom: there are no Secrets";
        assert!(error.contains(field), "{error}");
    }

    #[test]
    fn a_header_from_a_secret_is_refused_with_its_field_wherever_a_source_stands() {
        let digest = "0".repeat(64);
        let source = format!(
            "{{http: {{url: 'https://images.example/a', sha256: '{digest}', \
             authorizationFrom: {{secretKeyRef: {{name: images, key: authorization}}}}}}}}"
        );
        for (from, to, field) in [
            (
                "{hostFile: {name: vmlinuz}}",
                source.clone(),
                "spec.boot.kernel",
            ),
            (
                "    cmdline:",
                format!("    initrd: {source}\n    cmdline:"),
                "spec.boot.initrd",
            ),
            (
                "size: 1Gi",
                format!("size: 1Gi, source: {source}"),
                "spec.disks[0].source",
            ),
        ] {
            assert!(DOCUMENT.contains(from), "{from}");
            let document = DOCUMENT.replacen(from, &to, 1);
            let error = format!("{:#}", Document::parse(&document).unwrap_err());
            let refused = format!("{field}.http.authorizationFrom: there are no Secrets");
            assert!(error.contains(&refused), "{error}");
            // The control: without the reference, the document is sound.
            let (before, rest) = document.split_once(", authorizationFrom: ").unwrap();
            let (_, after) = rest.split_once("authorization}}").unwrap();
            Document::parse(&format!("{before}{after}")).unwrap();
        }
    }
}
