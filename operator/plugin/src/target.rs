//! The virtual machine, and its paths on the API server.

use bascule_crds::names::{SUBRESOURCES_GROUP, VERSION};

/// A VirtualMachine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Target {
    /// The path of one of its subresources.
    pub(crate) fn path(&self, subresource: &str) -> String {
        let Self { namespace, name } = self;
        format!(
            "/apis/{SUBRESOURCES_GROUP}/{VERSION}/namespaces/{namespace}/virtualmachines/{name}/{subresource}"
        )
    }
}
