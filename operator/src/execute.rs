//! Executes a plan: each action is one call to the Kubernetes API or one command to a node daemon.

mod api_actions;
mod execution;
mod import_source;
mod node_actions;
mod secret_texts;
mod secrets;

use anyhow::{Context, Result};
use bascule_node_api::command::Command;
use bascule_operator_core::Action;

use self::execution::action_name;
pub(crate) use self::execution::{Execution, Refused};
use crate::kube_api::is_namespace_terminating;
use crate::record_status;

impl Execution<'_> {
    /// Executes the actions in order and stops at the first error.
    pub(crate) async fn run(&mut self, actions: &[Action]) -> Result<()> {
        for action in actions {
            tracing::debug!(?action, "execute");
            let executed = self
                .execute(action)
                .await
                .with_context(|| action_name(action));
            if let Err(error) = &executed
                && error.downcast_ref().is_some_and(is_namespace_terminating)
            {
                self.memory.namespace_ending = true;
                let why = "the namespace is being deleted".to_owned();
                return Err(anyhow::Error::new(Refused(why)).context(action_name(action)));
            }
            executed?;
        }
        Ok(())
    }

    async fn execute(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::AddFinalizer => self.set_finalizer(true).await,
            Action::RemoveFinalizer => self.set_finalizer(false).await,
            Action::CreateReservation { .. }
            | Action::DeleteReservation { .. }
            | Action::PromoteReservation { .. }
            | Action::UpdateReservation { .. } => self.execute_reservation(action).await,
            Action::CreateMigration { name, mode } => self.create_migration(name, *mode).await,
            Action::ReportMigration { name, update } => {
                record_status::report_migration(self.context, self.vm, name, update).await
            }
            Action::CreateFailover {
                name,
                node,
                owner,
                epoch,
            } => self.create_failover(name, node, *owner, *epoch).await,
            Action::ReportFailover { name, update } => {
                record_status::report_failover(self.context, self.vm, name, update).await
            }
            Action::Event {
                reason,
                message,
                warning,
            } => {
                self.publish_event(reason, message, *warning).await;
                Ok(())
            }
            Action::Change { via, change } => self.request_change(via, change).await,
            Action::EndReservation { node, pod_uid } => {
                let command = Command::EndReservation {
                    pod_uid: pod_uid.clone(),
                };
                self.send_command(node, &command).await?;
                self.memory.hold_ended = Some((pod_uid.clone(), self.now));
                Ok(())
            }
            other => self.execute_on_node(other).await,
        }
    }
}
