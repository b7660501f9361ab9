//! The spec that a guest is started with: the VirtualMachine's, with the texts that it takes from Secrets
//! (`secrets.rs`).

use anyhow::Result;
use bascule_ipc::vm::VmStatus;
use bascule_node_api::cloud_init::inline_texts;
use bascule_node_api::command::{Command, Outcome, VmSpec};
use bascule_node_api::report::VmReport;
use bascule_types::{Epoch, VmUid};

use crate::execute::execution::Execution;
use crate::vm_intent::{secret_key, vm_spec};

impl Execution<'_> {
    /// A guest that is restored has its cloud-init disk in use: it gets the texts that it was started with, as
    /// long as the node that saved it responds.
    pub(super) async fn spec_to_start(&mut self, epoch: Epoch, restore: bool) -> Result<VmSpec> {
        let mut spec = vm_spec(self.vm)?;
        let asked = self.vm.spec.cloud_init.as_ref();
        let Some(asked) = asked.filter(|asked| asked.secrets().next().is_some()) else {
            return Ok(spec);
        };
        if restore
            && let Some(saved) = self.saved_spec(epoch).await?
            && spec.take_secret_texts(saved)
        {
            return Ok(spec);
        }
        let names = asked.secrets().map(|(_, secret)| secret.name.clone());
        let secrets = self.read_secrets(names.collect()).await?;
        match asked.resolve(|secret| secrets.text(&secret_key(secret))) {
            Ok(inline) => {
                spec.cloud_init = Some(inline_texts(&inline));
                Ok(spec)
            }
            Err(error) => Err(self.secret_unavailable(error.to_string())),
        }
    }

    /// The spec of the process that saved the guest for `epoch`, from its node; none when no node that responds
    /// has it.
    async fn saved_spec(&self, epoch: Epoch) -> Result<Option<VmSpec>> {
        let vm = self.intent.uid;
        let is_it = |process: &VmReport| saved_for(&process.status, vm, epoch);
        let source = self.context.nodes.reporting(is_it);
        let Some(node) = source else {
            return Ok(None);
        };
        let command = Command::ReadSpec { vm };
        match self.context.nodes.execute(&node, &command).await? {
            Outcome::Spec(spec) if spec.uid == vm => Ok(Some(*spec)),
            // It has removed the process in the meantime.
            _ => Ok(None),
        }
    }
}

/// Whether this is the process that saved the guest for `epoch`: its owner until then. The volume may tell of the new
/// epoch before the process's node reports that it has departed.
fn saved_for(process: &VmStatus, vm: VmUid, epoch: Epoch) -> bool {
    process.uid == vm && process.epoch.next() == epoch
}

#[cfg(test)]
mod tests {
    use bascule_ipc::vm::VmState;

    use super::*;

    #[test]
    fn the_process_that_saved_a_guest_is_known_before_it_is_reported_as_departed() {
        let vm = VmUid::from_bytes([1; 16]);
        let process = |epoch: u64, state| VmStatus {
            epoch: Epoch(epoch),
            ..VmStatus::bare(vm, 1, state)
        };
        let states = [
            VmState::Running,
            VmState::Paused,
            VmState::InDoubt,
            VmState::Departed,
        ];
        for state in states {
            assert!(saved_for(&process(2, state.clone()), vm, Epoch(3)));
            // The one that ran before it, and the one that is to be started.
            for other in [1, 3] {
                assert!(!saved_for(&process(other, state.clone()), vm, Epoch(3)));
            }
            let other_vm = VmUid::from_bytes([2; 16]);
            assert!(!saved_for(&process(2, state), other_vm, Epoch(3)));
        }
    }
}
