//! A node's configuration directory, the same in both tiers.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::addresses::Families;
use crate::config;
use crate::init::{DiskSpec, NativeSpec, NodeSpec, ServiceSpec};
use crate::names::{LabName, NodeIndex};
use crate::pki::{Pki, Subject};
use crate::san;
use crate::state::Tier;

/// Input of `native::start` and `emulated::start`.
#[derive(Debug)]
pub(crate) struct MachineContext<'a> {
    pub(crate) families: Families,
    pub(crate) name: &'a LabName,
    pub(crate) logs: &'a Path,
    pub(crate) files: &'a NodeFiles,
}

/// Directories of a node on the host.
#[derive(Debug, Clone)]
pub(crate) struct NodeFiles {
    /// Root of the node's files.
    pub(crate) dir: PathBuf,
    /// The node's configuration directory (`NODE_CONF` on the node).
    pub(crate) conf: PathBuf,
}

impl NodeFiles {
    /// The files of a node below `dir`.
    pub(crate) fn at(dir: PathBuf) -> Self {
        Self {
            conf: dir.join("conf"),
            dir,
        }
    }
}

/// The part of a [`NodeSpec`] that all nodes of a lab share.
#[derive(Debug)]
pub(crate) struct NodePlan {
    pub(crate) tier: Tier,
    pub(crate) families: Families,
    pub(crate) nodes: Vec<NodeIndex>,
    /// Absolute paths, as the node sees them.
    pub(crate) containerd: String,
    pub(crate) kubelet: String,
    pub(crate) kube_proxy: String,
    /// `PATH`.
    pub(crate) path: String,
    pub(crate) images: Vec<PathBuf>,
    pub(crate) disks: Vec<DiskSpec>,
    /// Whether the node is connected to the SAN.
    pub(crate) san: bool,
    /// Kernel modules to load in the background.
    pub(crate) late_modules: Vec<String>,
    /// Native: directory of the logs. Emulated: `None`, logs go to virtio ports.
    pub(crate) logs: Option<PathBuf>,
}

/// Writes a node's configuration directory.
pub(crate) fn write_conf(
    files: &NodeFiles,
    node: NodeIndex,
    plan: &NodePlan,
    native: Option<NativeSpec>,
    pki: &Pki,
) -> Result<()> {
    let (name, families) = (node.name(), plan.families);
    fs::create_dir_all(files.conf.join("cni")).context("make the configuration directory")?;
    let write = |file: &str, text: &str| {
        fs::write(files.conf.join(file), text).with_context(|| format!("write {file} of {name}"))
    };
    let user = format!("system:node:{name}");
    let serving = pki.issue(&Subject {
        user: &user,
        group: Some("system:nodes"),
        names: vec![name.clone()],
        addresses: families.each().map(|family| family.node(node)).collect(),
    })?;
    write("ca.crt", pki.ca_pem())?;
    write("kubelet.crt", &serving.cert)?;
    write("kubelet.key", &serving.key)?;
    let kubelet = pki.kubeconfig(&user, Some("system:nodes"))?;
    write("kubelet.kubeconfig", &kubelet.to_string())?;
    write(
        "kubelet.json",
        &config::kubelet(families.first()).to_string(),
    )?;
    let proxy = pki.kubeconfig("system:kube-proxy", None)?;
    write("kube-proxy.kubeconfig", &proxy.to_string())?;
    write("kube-proxy.json", &config::kube_proxy(families).to_string())?;
    write("containerd.toml", &config::containerd())?;
    write(
        "cni/10-pods.conflist",
        &config::cni(families, node).to_string(),
    )?;
    let spec = spec(node, plan, native);
    write(
        "spec.json",
        &serde_json::to_string_pretty(&spec).context("serialize the spec")?,
    )
}

fn spec(node: NodeIndex, plan: &NodePlan, native: Option<NativeSpec>) -> NodeSpec {
    let name = node.name();
    let conf = config::NODE_CONF;
    let service = |service: &str, argv: Vec<String>| ServiceSpec {
        name: service.to_owned(),
        argv,
        log: match &plan.logs {
            Some(dir) => dir.join(format!("{name}-{service}.log")),
            None => PathBuf::from(service),
        },
    };
    let mut services = vec![
        service(
            "containerd",
            vec![
                plan.containerd.clone(),
                format!("--config={conf}/containerd.toml"),
            ],
        ),
        service(
            "kubelet",
            vec![
                plan.kubelet.clone(),
                format!("--config={conf}/kubelet.json"),
                format!("--kubeconfig={conf}/kubelet.kubeconfig"),
                format!("--hostname-override={name}"),
                format!(
                    "--node-ip={}",
                    plan.families.list(|family| family.node(node))
                ),
            ],
        ),
        service(
            "kube-proxy",
            vec![
                plan.kube_proxy.clone(),
                format!("--config={conf}/kube-proxy.json"),
                format!("--hostname-override={name}"),
            ],
        ),
    ];
    if plan.san {
        services.push(service(san::SERVICE, san::service_argv(&name)));
    }
    NodeSpec {
        index: node,
        tier: plan.tier,
        families: plan.families,
        nodes: plan.nodes.clone(),
        path: plan.path.clone(),
        services,
        images: plan.images.clone(),
        disks: plan.disks.clone(),
        late_modules: plan.late_modules.clone(),
        native,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_configuration_has_its_own_name_address_and_certificate() {
        let (pki_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let pki = Pki::create(pki_dir.path(), Tier::Emulated.families().first()).unwrap();
        let files = NodeFiles::at(dir.path().to_owned());
        let node = NodeIndex::new(2).unwrap();
        let plan = NodePlan {
            tier: Tier::Emulated,
            families: Tier::Emulated.families(),
            nodes: vec![node],
            containerd: "/opt/lab/bin/containerd".into(),
            kubelet: "/opt/lab/bin/kubelet".into(),
            kube_proxy: "/opt/lab/bin/kube-proxy".into(),
            path: "/bin".into(),
            images: Vec::new(),
            disks: Vec::new(),
            san: false,
            late_modules: Vec::new(),
            logs: None,
        };
        write_conf(&files, node, &plan, None, &pki).unwrap();
        let spec = fs::read_to_string(files.conf.join("spec.json")).unwrap();
        let spec: NodeSpec = serde_json::from_str(&spec).unwrap();
        assert_eq!(spec.services[0].name, "containerd");
        assert!(
            spec.services[1]
                .argv
                .contains(&"--node-ip=10.90.0.12".to_owned())
        );
        assert_eq!(spec.services[1].log, Path::new("kubelet"));
        let kubelet = fs::read_to_string(files.conf.join("kubelet.kubeconfig")).unwrap();
        assert!(kubelet.contains("system:node:n2"));
    }
}
