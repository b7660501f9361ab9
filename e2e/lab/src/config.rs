//! Configuration files of the cluster's components, rendered from the lab's addresses. Pure.

use std::path::Path;

use serde_json::{Value, json};

use crate::addresses::{Families, Family};
use crate::image::PAUSE_IMAGE;
use crate::names::NodeIndex;

/// Where a node finds its own configuration, in both tiers.
pub const NODE_CONF: &str = "/run/lab/conf";

/// Kubelet configuration; JSON is YAML.
pub fn kubelet(family: Family) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{NODE_CONF}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{NODE_CONF}/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{NODE_CONF}/kubelet.key"),
        "address": family.unspecified(),
        // The host may have v1 hierarchies only.
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        // Disk eviction at 1 % only: the host's disk is not under test. A scenario needs memory pressure.
        "evictionHard": {
            "memory.available": "300Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        // Default 5 min. Shorter, so that the scenario after one of memory pressure does not wait.
        "evictionPressureTransitionPeriod": "10s",
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "resolvConf": "",
        "clusterDNS": [family.hub()],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "nodeStatusUpdateFrequency": "4s",
        // Emulated nodes are slow: a minute is not an error there.
        "runtimeRequestTimeout": "4m",
        "shutdownGracePeriod": "0s",
        "maxPods": 60,
    })
}

/// containerd configuration.
pub fn containerd() -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE_IMAGE}"

[plugins."io.containerd.cri.v1.runtime"]
# Nothing may lower an oom_score_adj without CAP_SYS_RESOURCE.
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "/usr/sbin/runc"
SystemdCgroup = false

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "{NODE_CONF}/cni"

[plugins."io.containerd.nri.v1.nri"]
disable = true
"#
    )
}

/// CNI configuration: a bridge per node. Pods of other nodes are routed, nothing is masqueraded.
pub fn cni(families: Families, node: NodeIndex) -> Value {
    let range = |family: Family| json!([{"subnet": family.pods_of(node)}]);
    let route = |family: Family| json!({"dst": family.everywhere()});
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "pods0",
                "isGateway": true,
                "ipMasq": false,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": families.each().map(range).collect::<Vec<_>>(),
                    "routes": families.each().map(route).collect::<Vec<_>>(),
                    "dataDir": "/run/cni/pods",
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// kube-proxy configuration.
pub fn kube_proxy(families: Families) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "bindAddress": families.first().unspecified(),
        "clusterCIDR": families.list(Family::pods),
        "clientConnection": {"kubeconfig": format!("{NODE_CONF}/kube-proxy.kubeconfig")},
        // 0: do not set the kernel's limits; they are not writable in a network namespace.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    })
}

/// Corefile of the lab's DNS, which runs beside the control plane.
pub fn corefile(family: Family, kubeconfig: &Path) -> String {
    format!(
        ".:53 {{
    bind {}
    errors
    ready 127.0.0.1:8181
    kubernetes cluster.local {} {{
        kubeconfig {}
        pods insecure
    }}
}}
",
        family.hub(),
        family.reverse_zone(),
        kubeconfig.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Tier;

    #[test]
    fn a_node_gives_its_pods_addresses_of_its_own_subnet_and_the_labs_dns() {
        let (v4, v6) = ("10.92.3.0/24", "fd00:92:0:3::/64");
        for (families, subnets, dns) in [
            (Tier::Emulated.families(), &[v4][..], "10.90.0.1"),
            (Tier::Native.families(), &[v6], "fd00:90::1"),
            (Families::DUAL, &[v4, v6], "10.90.0.1"),
        ] {
            let conf = cni(families, NodeIndex::new(3).unwrap());
            let family = families.first();
            let ipam = &conf["plugins"][0]["ipam"];
            let ranges: Vec<Value> = subnets.iter().map(|s| json!([{"subnet": s}])).collect();
            assert_eq!(ipam["ranges"], json!(ranges));
            assert_eq!(ipam["routes"].as_array().unwrap().len(), subnets.len());
            assert_eq!(kubelet(family)["clusterDNS"][0], dns);
            assert!(corefile(family, Path::new("/k")).contains(&format!("bind {dns}\n")));
        }
    }

    #[test]
    fn containerd_knows_the_pause_image_that_the_lab_imports() {
        assert!(containerd().contains(&format!("sandbox = {PAUSE_IMAGE:?}")));
    }
}
