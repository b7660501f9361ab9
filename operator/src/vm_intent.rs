//! Conversion of a VirtualMachine object into what the planner and the node daemons take.

use std::time::Duration;

use anyhow::{Context, Result};
use bascule_crds::{
    DeletionPolicy, Disk, SecretKeyRef, Source, SourceKind, VirtualMachine, mac_address,
};
use bascule_image::{INITRD_BYTES_MAX, KERNEL_BYTES_MAX};
use bascule_node_api::cloud_init::{CloudInitSecrets, inline_texts};
use bascule_node_api::command::{DiskRef, Interface, VmSpec};
use bascule_operator_core::{
    Budgets, DiskIntent, ImageSource, Origin, RestartBudget, SpecDigest, VmIntent,
};
use bascule_types::{Bytes, DiskRole, ImageDigest, OnError, OnPanic, RowName, SecretKey};
use sha2::{Digest, Sha256};

use crate::clock::moment;

/// The planner's input. Fails if the spec is invalid, with every invalid field named.
pub(crate) fn intent(vm: &VirtualMachine) -> Result<VmIntent> {
    vm.spec.check(&vm.metadata).map_err(|errors| {
        let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("{}", all.join("; "))
    })?;
    let (namespace, name) = names(vm);
    let limits = &vm.spec.availability.migration;
    let restart = &vm.spec.availability.restart;
    Ok(VmIntent {
        uid: vm
            .metadata
            .uid
            .as_deref()
            .unwrap_or_default()
            .parse()
            .context("metadata.uid")?,
        row: RowName::new(format!("{namespace}/{name}")).context("metadata.name")?,
        volume: vm.spec.volume.clone(),
        run: vm.spec.run_policy,
        deleting_since: vm
            .metadata
            .deletion_timestamp
            .as_ref()
            .map(|at| moment(&at.0)),
        finalizer: has_finalizer(vm),
        digest: digest(vm)?,
        disks: disks(vm, &namespace, &name)?,
        on_drain: vm.spec.availability.on_drain,
        on_failure: vm.spec.availability.on_node_failure,
        budgets: Budgets {
            downtime: limits.downtime.to_std()?,
            live: limits.live_timeout.to_std()?,
            quick: limits.quick_timeout.to_std()?,
            shutdown: limits.shutdown_timeout.to_std()?,
            bandwidth: limits
                .bandwidth
                .as_ref()
                .map(bascule_crds::Quantity::to_bytes)
                .transpose()?,
        },
        restart: RestartBudget {
            attempts_max: usize::try_from(restart.attempts_max).unwrap_or(0),
            window: restart.window.to_std()?,
            backoff: restart.backoff.to_std()?,
        },
        namespace,
        name,
    })
}

/// What a node daemon needs to start the VM, but for the texts that come from Secrets, which are empty.
pub(crate) fn vm_spec(vm: &VirtualMachine) -> Result<VmSpec> {
    let (namespace, name) = names(vm);
    let uid = vm.metadata.uid.as_deref().unwrap_or_default();
    let image = |disk: &str| qualified_disk_name(&namespace, &name, disk);
    let spec = &vm.spec;
    Ok(VmSpec {
        uid: uid.parse().context("metadata.uid")?,
        volume: spec.volume.clone(),
        cpus: u8::try_from(spec.cpu.cores).context("spec.cpu.cores")?,
        memory: Bytes(spec.memory.to_bytes().context("spec.memory")?),
        kernel: spec.boot.kernel.as_ref().map(|_| image(KERNEL)),
        initrd: spec.boot.initrd.as_ref().map(|_| image(INITRD)),
        cmdline: spec.boot.cmdline.clone(),
        disks: spec
            .disks
            .iter()
            .map(|disk| DiskRef {
                name: disk.name.clone(),
                row: disk_row(&namespace, &name, disk),
                on_error: on_error(disk),
                read_only: disk.read_only,
            })
            .collect(),
        interfaces: spec
            .interfaces
            .iter()
            .map(|interface| {
                let requested = interface.mac.as_deref().and_then(parse_mac);
                Interface {
                    network: interface.bridge.clone(),
                    mac: requested.unwrap_or_else(|| mac_address(uid, &interface.name)),
                }
            })
            .collect(),
        shutdown_timeout_ms: Some(millis(
            spec.availability.migration.shutdown_timeout.to_std()?,
        )),
        cloud_init: spec.cloud_init.as_ref().map(inline_texts),
        cloud_init_secrets: spec
            .cloud_init
            .as_ref()
            .map(CloudInitSecrets::of)
            .unwrap_or_default(),
        guest_agent: spec.guest_agent,
        on_panic: on_panic(spec.on_panic),
        namespace,
        name,
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Digest of all fields that the reservation pod or the running guest depends on; a different digest
/// means that a restart is required.
pub(crate) fn digest(vm: &VirtualMachine) -> Result<SpecDigest> {
    let spec = VmSpec {
        shutdown_timeout_ms: None,
        ..vm_spec(vm)?
    };
    let relevant = (spec, &vm.spec.placement);
    let json = serde_json::to_vec(&relevant).context("serialize the spec")?;
    Ok(SpecDigest(Sha256::digest(json).into()))
}

/// `terminationGracePeriodSeconds` of the reservation pod: live, quick and shutdown budgets and a
/// margin, so that a drain tries all three before the kubelet kills the pod.
pub(crate) fn grace(vm: &VirtualMachine) -> Result<Duration> {
    let limits = &vm.spec.availability.migration;
    let stages = limits.live_timeout.to_std()?
        + limits.quick_timeout.to_std()?
        + limits.shutdown_timeout.to_std()?;
    Ok(stages + GRACE_MARGIN)
}

/// Namespace and name, in this order.
pub(crate) fn names(vm: &VirtualMachine) -> (String, String) {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    (text(&vm.metadata.namespace), text(&vm.metadata.name))
}

fn has_finalizer(vm: &VirtualMachine) -> bool {
    let ours = |finalizer: &String| finalizer == bascule_crds::names::VM_FINALIZER;
    vm.metadata.finalizers.iter().flatten().any(ours)
}

fn disks(vm: &VirtualMachine, namespace: &str, name: &str) -> Result<Vec<DiskIntent>> {
    let boot = |disk: &str, role, size, source: &Source| -> Result<DiskIntent> {
        Ok(DiskIntent {
            name: disk.to_owned(),
            row: RowName::new(qualified_disk_name(namespace, name, disk))?,
            role,
            origin: Origin::Image {
                size,
                source: image_source(source)?,
            },
            delete_with_vm: true,
            on_error: bascule_crds::OnError::Report,
        })
    };
    let mut all = Vec::new();
    if let Some(kernel) = &vm.spec.boot.kernel {
        let size = Bytes(KERNEL_BYTES_MAX);
        all.push(boot(KERNEL, DiskRole::Kernel, size, kernel)?);
    }
    if let Some(initrd) = &vm.spec.boot.initrd {
        let size = Bytes(INITRD_BYTES_MAX);
        all.push(boot(INITRD, DiskRole::Initrd, size, initrd)?);
    }
    for disk in &vm.spec.disks {
        let size =
            || -> Result<Bytes> { Ok(Bytes(disk.size.as_ref().context("size")?.to_bytes()?)) };
        let origin = match (&disk.existing, &disk.source) {
            (Some(_), _) => Origin::Existing,
            (None, Some(source)) => Origin::Image {
                size: size()?,
                source: image_source(source)?,
            },
            (None, None) => Origin::Blank { size: size()? },
        };
        all.push(DiskIntent {
            name: disk.name.clone(),
            row: RowName::new(disk_row(namespace, name, disk))?,
            role: DiskRole::Data,
            origin,
            delete_with_vm: disk.deletion_policy == DeletionPolicy::Delete,
            on_error: disk.on_error,
        });
    }
    Ok(all)
}

fn image_source(source: &Source) -> Result<ImageSource> {
    match source
        .kind()
        .context("set exactly one of http and hostFile")?
    {
        SourceKind::Http(http) => Ok(ImageSource::Http {
            url: http.url.clone(),
            digest: ImageDigest::of(http.sha256.as_deref(), http.sha512.as_deref())
                .context("set exactly one of sha256 and sha512")?,
            ca_bundle: http.ca_bundle.clone(),
            authorization_from: http
                .authorization_from
                .as_ref()
                .map(|from| secret_key(&from.secret_key_ref)),
        }),
        SourceKind::HostFile(file) => Ok(ImageSource::HostFile {
            name: file.name.clone(),
        }),
    }
}

/// A reference in a VirtualMachine's spec.
pub(crate) fn secret_key(asked: &SecretKeyRef) -> SecretKey {
    SecretKey {
        name: asked.name.clone(),
        key: asked.key.clone(),
    }
}

fn on_error(disk: &Disk) -> OnError {
    match disk.on_error {
        bascule_crds::OnError::Report => OnError::Report,
        bascule_crds::OnError::Pause => OnError::Pause,
    }
}

fn on_panic(policy: bascule_crds::OnPanic) -> OnPanic {
    match policy {
        bascule_crds::OnPanic::Restart => OnPanic::Restart,
        bascule_crds::OnPanic::Leave => OnPanic::Leave,
    }
}

fn disk_row(namespace: &str, vm: &str, disk: &Disk) -> String {
    match &disk.existing {
        Some(existing) => format!("{namespace}/{}", existing.name),
        None => qualified_disk_name(namespace, vm, &disk.name),
    }
}

fn qualified_disk_name(namespace: &str, vm: &str, disk: &str) -> String {
    format!("{namespace}/{vm}.{disk}")
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// Name of the disk on the volume that holds the kernel.
pub(crate) const KERNEL: &str = "boot-kernel";
/// Name of the disk on the volume that holds the initrd.
pub(crate) const INITRD: &str = "boot-initrd";
/// Time for the operator to observe the end of the last stage and for the hold process to exit (guess).
const GRACE_MARGIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(patch: &serde_json::Value) -> VirtualMachine {
        let mut document = serde_json::json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {
                "name": "web", "namespace": "shop",
                "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e",
            },
            "spec": {
                "memory": "512Mi", "volume": "san",
                "boot": {"kernel": {"hostFile": {"name": "k"}}, "cmdline": "quiet"},
                "disks": [
                    {"name": "root", "size": "1Gi", "deletionPolicy": "Delete"},
                    {"name": "data", "existing": {"name": "old.data"}},
                ],
                "interfaces": [{"name": "lan", "bridge": "lan", "mac": "02:00:00:00:00:0a"}],
            },
        });
        for (key, value) in patch.as_object().unwrap() {
            document["spec"][key] = value.clone();
        }
        serde_json::from_value(document).unwrap()
    }

    #[test]
    fn disks_are_named_after_namespace_and_virtual_machine() {
        let intent = intent(&vm(&serde_json::json!({}))).unwrap();
        let rows: Vec<&str> = intent.disks.iter().map(|disk| disk.row.as_str()).collect();
        assert_eq!(
            rows,
            ["shop/web.boot-kernel", "shop/web.root", "shop/old.data"]
        );
        assert!(intent.disks[1].delete_with_vm && !intent.disks[2].delete_with_vm);
    }

    #[test]
    fn a_vm_spec_has_mac_addresses_and_names_of_disks_on_the_volume() {
        let spec = vm_spec(&vm(&serde_json::json!({}))).unwrap();
        assert_eq!(spec.interfaces[0].mac, [2, 0, 0, 0, 0, 10]);
        assert_eq!(spec.disks[1].row, "shop/old.data");
        assert_eq!(spec.memory, Bytes::mib(512));
    }

    #[test]
    fn the_digest_covers_only_fields_that_need_a_restart() {
        let base = digest(&vm(&serde_json::json!({}))).unwrap();
        let of = |patch| digest(&vm(&patch)).unwrap();
        assert_ne!(of(serde_json::json!({"memory": "1Gi"})), base);
        assert_ne!(
            of(serde_json::json!({"placement": {"nodeSelector": {"a": "b"}}})),
            base
        );
        assert_eq!(of(serde_json::json!({"runPolicy": "Stopped"})), base);
        assert_ne!(of(serde_json::json!({"guestAgent": true})), base);
        assert_ne!(of(serde_json::json!({"onPanic": "Leave"})), base);
        assert_eq!(of(serde_json::json!({"onPanic": "Restart"})), base);
        let seed = |key: &str| {
            let from = serde_json::json!({"secretKeyRef": {"name": "seed", "key": key}});
            of(serde_json::json!({"cloudInit": {"userDataFrom": from}}))
        };
        assert_ne!(seed("a"), seed("b"));
        let longer = serde_json::json!({"availability": {"migration": {"shutdownTimeout": "9m"}}});
        assert_eq!(of(longer.clone()), base);
        let told = vm_spec(&vm(&longer)).unwrap().shutdown_timeout_ms;
        assert_eq!(told, Some(540_000));
    }

    #[test]
    fn the_grace_period_covers_live_quick_and_shutdown() {
        let limits = serde_json::json!({"availability": {"migration": {
            "liveTimeout": "10s", "quickTimeout": "20s", "shutdownTimeout": "30s"}}});
        assert_eq!(
            grace(&vm(&limits)).unwrap(),
            Duration::from_secs(60) + GRACE_MARGIN
        );
    }

    #[test]
    fn an_invalid_spec_is_refused_with_the_name_of_the_field() {
        let error = intent(&vm(&serde_json::json!({"memory": "1"}))).unwrap_err();
        assert!(error.to_string().contains("spec.memory"), "{error}");
    }
}
