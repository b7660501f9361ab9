//! The state that the actions of one plan share.

use bascule_crds::VirtualMachine;
use bascule_operator_core::{Action, Moment, PlannerMemory, VmIntent};
use kube::{Api, Resource};

use crate::context::OperatorContext;

/// A node or a volume refused an action. Conditions report it to users; it is not a reconcile error, so
/// it is logged at INFO and not counted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

/// Executes one plan of one VM.
pub(crate) struct Execution<'a> {
    pub(crate) context: &'a OperatorContext,
    /// As it was when the plan was made.
    pub(crate) vm: &'a VirtualMachine,
    pub(crate) intent: &'a VmIntent,
    pub(crate) now: Moment,
    /// The planner's memory of this VM; executing an action updates it.
    pub(crate) memory: &'a mut PlannerMemory,
}

impl Execution<'_> {
    /// The API of a namespaced kind in the VM's namespace.
    pub(super) fn namespaced<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.context.client.clone(), &self.intent.namespace)
    }
}

/// The name of the action's variant, as context for errors.
pub(super) fn action_name(action: &Action) -> String {
    let text = format!("{action:?}");
    let end = text.find([' ', '{']).unwrap_or(text.len());
    text[..end].to_owned()
}
