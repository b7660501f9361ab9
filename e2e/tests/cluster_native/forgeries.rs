//! What the authors of VMs can do to the operator's own objects with the Kubernetes role `edit`: nothing that
//! counts.

use std::time::Duration;

use anyhow::{Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation, NAMESPACE, condition};
use bascule_lab::Lab;
use serde_json::Value;

use super::CLUSTER;

/// Costs 75 s, most of them the minute for which a pod without a record is left alone.
#[test]
fn a_tenant_cannot_forge_a_reservation_nor_resize_a_running_guests() {
    let name = "a_tenant_cannot_forge_a_reservation_nor_resize_a_running_guests";
    CLUSTER.with_vm("forged", 77, |cluster, vm| {
        let lab = cluster.lab();
        let tenant = Tenant::admit(cluster);
        let mut talk = vm.talk().unwrap();
        let home = vm.node().unwrap();
        let mut others = lab.nodes().map(|node| node.name());
        let other = others.find(|node| *node != home).unwrap();
        let pod = reservations(lab, vm).unwrap().remove(0)["metadata"]["name"].clone();
        let pod = pod.as_str().unwrap();

        let avoid = format!("bascule.dev/avoid={home}");
        let forged = ["bascule.dev/spec={}", "bascule.dev/migration=go", &avoid];
        tenant.kubectl(&[&["annotate", "pod", pod], &forged[..]].concat());
        tenant.kubectl(&["label", "--overwrite", "pod", pod, "bascule.dev/purpose=migration"]);
        let uid = vm.object().unwrap()["metadata"]["uid"].clone();
        tenant.apply(&forged_pod(&uid, &other));
        let smaller = r#"{"spec": {"containers": [{"name": "hold", "resources": {"requests": {"memory": "1Mi"}}}]}}"#;
        for (args, patch) in [
            (["vm", "forged", "--subresource=status"], r#"{"status": {"reservations": []}}"#),
            (["vm", "forged", "--field-manager=tenant"], r#"{"metadata": {"finalizers": []}}"#),
            (["pod", pod, "--subresource=resize"], smaller),
        ] {
            tenant.is_refused(&[&["patch"], &args[..], &["--type=merge", "-p", patch]].concat());
        }
        // Not even to an administrator.
        let resize = ["patch", "pod", pod, "-n", NAMESPACE, "--subresource=resize", "-p", smaller];
        let refused = lab.kubectl(&resize).expect_err("a reservation was resized");
        assert!(format!("{refused:#}").contains("spec.memory"), "{refused:#}");

        lab.wait_for("the forged pod to be deleted", DELETED_LIMIT, || {
            let pods = reservations(lab, vm)?;
            ensure!(pods.len() == 1, "{} pods", pods.len());
            Ok(())
        })
        .unwrap();
        let events = ["get", "events", "-n", NAMESPACE, "-o", "json"];
        let events = lab.kubectl(&events).unwrap();
        assert!(events.contains("ForeignReservation"), "{name}: nobody is told");
        assert_eq!(vm.node().unwrap(), home);
        assert_eq!(vm.moves().unwrap().len(), 0, "it moved");

        // The guest has 128 MiB until it is started again, and so has its next reservation.
        let larger = r#"{"spec": {"memory": "256Mi"}}"#;
        tenant.kubectl(&["patch", "vm", "forged", "--type=merge", "-p", larger]);
        tenant.kubectl(&["delete", "pod", pod, "--wait=false"]);
        vm.wait_elsewhere(&home, MOVED_LIMIT).unwrap();
        lab.wait_for("the old reservation to end", MOVED_LIMIT, || {
            let pods = reservations(lab, vm)?;
            ensure!(pods.len() == 1, "{} pods", pods.len());
            let requests = &pods[0]["spec"]["containers"][0]["resources"]["requests"];
            ensure!(requests["memory"] == "201326592", "{requests}");
            Ok(())
        })
        .unwrap();
        condition(&vm.object().unwrap(), "RestartRequired").unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
    });
}

fn reservations(lab: &Lab, vm: &ClusterVm<'_>) -> Result<Vec<Value>> {
    let label = format!("-lbascule.dev/virtual-machine={}", vm.name);
    let pods = lab.get(&["pod", "-n", NAMESPACE, &label])?;
    Ok(pods["items"].as_array().cloned().unwrap_or_default())
}

/// A pod with everything that a reservation for a move to `node` had once.
fn forged_pod(uid: &Value, node: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: forged-e9-0\n  namespace: {NAMESPACE}\n  \
         labels: {{bascule.dev/role: reservation, bascule.dev/virtual-machine: forged, bascule.dev/purpose: current}}\n  \
         ownerReferences: [{{apiVersion: bascule.dev/v1alpha1, kind: VirtualMachine, name: forged, uid: {uid}, controller: true}}]\n\
         spec:\n  nodeSelector: {{kubernetes.io/hostname: {node}}}\n  containers: [{{name: hold, image: none.invalid/none, \
         imagePullPolicy: Never}}]\n"
    )
}

/// A user with the role `edit` in the namespace of the virtual machines, as long as this value lives.
struct Tenant<'a>(&'a Installation);

impl<'a> Tenant<'a> {
    fn admit(cluster: &'a Installation) -> Self {
        let tenant = Self(cluster);
        let binding = [
            "create",
            "rolebinding",
            "tenant",
            "-n",
            NAMESPACE,
            "--clusterrole=edit",
        ];
        (cluster
            .lab()
            .kubectl(&[&binding[..], &["--user=tenant"]].concat()))
        .unwrap();
        tenant
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let whoever = ["--as=tenant", "-n", NAMESPACE];
        self.0.lab().kubectl(&[&whoever[..], args].concat())
    }

    fn is_refused(&self, args: &[&str]) {
        let refused = self.run(args).expect_err("a tenant has the right");
        let refused = format!("{refused:#}");
        let told = refused.contains("forbidden") || refused.contains("Forbidden");
        assert!(told, "{args:?}: {refused}");
    }

    /// What the role allows.
    fn kubectl(&self, args: &[&str]) {
        self.run(args).unwrap();
    }

    fn apply(&self, yaml: &str) {
        let args = ["--as=tenant", "create", "-f", "-"];
        let run = self.0.lab().kubectl_run().unwrap().args(args);
        run.stdin(yaml).done().unwrap();
    }
}

impl Drop for Tenant<'_> {
    fn drop(&mut self) {
        let delete = [
            "delete",
            "rolebinding",
            "tenant",
            "-n",
            NAMESPACE,
            "--ignore-not-found",
        ];
        if let Err(error) = self.0.lab().kubectl(&delete) {
            eprintln!("{error:#}");
        }
    }
}

/// The minute for which a pod without a record is left alone, and a kubelet.
const DELETED_LIMIT: Duration = Duration::from_secs(150);
const MOVED_LIMIT: Duration = Duration::from_secs(120);
