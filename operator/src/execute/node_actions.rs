//! Actions that a node daemon executes.

use anyhow::{Result, anyhow, bail};
use bascule_crds::names::reason;
use bascule_node_api::command::{Command, Outcome, RejectReason, VmSpec};
use bascule_operator_core::{Action, PlannerMemory, VmIntent};
use bascule_types::{AttemptId, Change, Epoch, Owner, Refusal};

use crate::execute::execution::{Execution, Refused, action_name};
use crate::node_clients::has_guest;

impl Execution<'_> {
    pub(super) async fn send_command(&mut self, node: &str, command: &Command) -> Result<Outcome> {
        let outcome = self.context.nodes.execute(node, command).await?;
        if let Outcome::Rejected {
            reason: why,
            message,
        } = &outcome
        {
            let reason = match command {
                Command::StartVm { .. } => reason::START_FAILED,
                Command::Import { .. } => reason::IMPORT_FAILED,
                _ => reason::VOLUME_REFUSED,
            };
            let attempt = match command {
                Command::MigrateLive { attempt, .. }
                | Command::MigrateQuick { attempt, .. }
                | Command::PrepareIncoming { attempt, .. } => Some(*attempt),
                _ => None,
            };
            if let Some(attempt) = attempt {
                let text = format!("{node}: {message}");
                // Keep the time of the first refusal: a repeated command must not extend the timeout
                // that starts with it.
                let known = self
                    .memory
                    .move_rejected
                    .as_ref()
                    .is_some_and(|r| r.0 == attempt);
                if !known && *why != RejectReason::ProcessUnresponsive {
                    self.memory.move_rejected = Some((attempt, self.now, text));
                }
            } else {
                self.memory.error = Some((reason, format!("{node}: {message}")));
            }
            let text = format!("{node} rejected the command ({why:?}): {message}");
            return Err(match why {
                // A malfunction, not a refusal.
                RejectReason::ProcessUnresponsive => anyhow!(text),
                _ => Refused(text).into(),
            });
        }
        Ok(outcome)
    }

    pub(super) async fn request_change(&mut self, via: &str, change: &Change) -> Result<()> {
        let command = Command::Change {
            volume: self.intent.volume.clone(),
            change: change.clone(),
        };
        let outcome = self.send_command(via, &command).await;
        self.context.ownership.refresh(&self.intent.volume).await;
        match outcome? {
            Outcome::Granted(_) | Outcome::Done => {
                if matches!(change, Change::TakeOver { .. }) {
                    self.memory.takeover_refusal = None;
                    self.context.metrics.takeovers.inc();
                }
                Ok(())
            }
            Outcome::Refused(refusal) => self.refused(change, refusal),
            // A coordinator election is under way.
            Outcome::Unknown => Err(Refused("no coordinator responded; will retry".into()).into()),
            other => bail!("unexpected outcome {other:?}"),
        }
    }

    fn refused(&mut self, change: &Change, refusal: Refusal) -> Result<()> {
        if matches!(change, Change::TakeOver { .. }) {
            self.memory.takeover_refusal = Some(refusal);
            // Expected: the volume refuses a takeover until there is a fence proof.
            return Ok(());
        }
        let (reason, message) = refusal_condition(self.intent, change, &refusal);
        self.memory.error = Some((reason, message.clone()));
        Err(Refused(message).into())
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each action")]
    pub(super) async fn execute_on_node(&mut self, action: &Action) -> Result<()> {
        let vm = self.intent.uid;
        let (node, command) = match action {
            Action::Import {
                node,
                owner,
                epoch,
                disk,
                attempt,
                source,
                field,
            } => {
                let command = Command::Import {
                    volume: self.intent.volume.clone(),
                    vm,
                    owner: *owner,
                    epoch: *epoch,
                    disk: *disk,
                    attempt: *attempt,
                    source: self.import_source(field, source).await?,
                };
                (node, command)
            }
            Action::CancelImport { node, disk } => (node, Command::CancelImport { disk: *disk }),
            Action::StartVm {
                node,
                owner,
                epoch,
                restore,
            } => {
                let spec = self.spec_to_start(*epoch, *restore).await?;
                let command = Command::StartVm {
                    spec,
                    owner: *owner,
                    epoch: *epoch,
                    restore: *restore,
                };
                (node, command)
            }
            Action::PrepareIncoming {
                node,
                attempt,
                owner,
                epoch,
            } => {
                return self.prepare_incoming(node, *attempt, *owner, *epoch).await;
            }
            Action::MigrateLive {
                node,
                attempt,
                peer,
                to,
                limits,
                ..
            } => {
                let (attempt, peer, to, limits) = (*attempt, *peer, *to, *limits);
                (
                    node,
                    Command::MigrateLive {
                        vm,
                        attempt,
                        peer,
                        to,
                        limits,
                    },
                )
            }
            Action::MigrateQuick {
                node, attempt, to, ..
            } => (
                node,
                Command::MigrateQuick {
                    vm,
                    attempt: *attempt,
                    to: Some(*to),
                },
            ),
            Action::CancelMigration { node, attempt } => (
                node,
                Command::CancelMigration {
                    vm,
                    attempt: *attempt,
                },
            ),
            Action::PowerButton { node } => {
                self.memory.power_button = Some(self.now);
                (node, Command::PowerButton { vm })
            }
            Action::StopVm { node } => (node, Command::StopVm { vm }),
            Action::ReportDiskErrors { node, disk } => {
                let disk = disk.clone();
                (node, Command::ReportDiskErrors { vm, disk })
            }
            Action::CollectVm { node, pid } => (node, Command::CollectVm { vm, pid: *pid }),
            other => bail!("not an action for a node: {}", action_name(other)),
        };
        self.send_command(node, &command).await?;
        remember_done(self.memory, action);
        Ok(())
    }

    /// The spec of the running guest, from the record of the node that it runs on; none when no node
    /// reports it. An edit of the VirtualMachine does not change it.
    pub(super) async fn running_spec(&mut self) -> Result<Option<VmSpec>> {
        let vm = self.intent.uid;
        let nodes = &self.context.nodes;
        let home = nodes.reporting(|process| has_guest(process, vm));
        let Some(node) = home else {
            return Ok(None);
        };
        match self.send_command(&node, &Command::ReadSpec { vm }).await? {
            Outcome::Spec(spec) if spec.uid == vm => Ok(Some(*spec)),
            other => bail!("{node} did not tell the spec of the guest: {other:?}"),
        }
    }

    async fn prepare_incoming(
        &mut self,
        node: &str,
        attempt: AttemptId,
        owner: Owner,
        epoch: Epoch,
    ) -> Result<()> {
        let Some(spec) = self.running_spec().await? else {
            return Err(Refused("the guest runs on no node that reports".to_owned()).into());
        };
        let command = Command::PrepareIncoming {
            spec,
            attempt,
            owner,
            epoch,
        };
        match self.send_command(node, &command).await? {
            Outcome::Listening { address } => {
                self.memory.listening = Some((attempt, address));
                Ok(())
            }
            other => bail!("{node} did not start an incoming VM: {other:?}"),
        }
    }
}

/// What the planner has to know of a command that a node has carried out.
fn remember_done(memory: &mut PlannerMemory, action: &Action) {
    match action {
        // An import that still waits for its Secret is a later action, and says so again.
        Action::Import { .. } | Action::StartVm { .. } => memory.error = None,
        Action::MigrateLive { attempt, pid, .. } | Action::MigrateQuick { attempt, pid, .. } => {
            memory.move_begun = Some((*attempt, *pid));
        }
        _ => {}
    }
}

/// The condition's reason and message for a request that the volume refused; the message names the
/// field of the spec that led to it.
fn refusal_condition(
    intent: &VmIntent,
    change: &Change,
    refusal: &Refusal,
) -> (&'static str, String) {
    let reason = match refusal {
        Refusal::Full { .. } | Refusal::TableFull { .. } => reason::VOLUME_FULL,
        Refusal::NameTaken | Refusal::DiskDiffers => reason::DISK_CLAIMED,
        _ => reason::VOLUME_REFUSED,
    };
    let row = match change {
        Change::CreateDisk { name, .. } | Change::AttachDisk { name, .. } => Some(name),
        _ => None,
    };
    let disk = intent.disks.iter().find(|disk| Some(&disk.row) == row);
    let field = disk.map(|disk| format!("{}: ", disk.field()));
    let row = row.map(|row| format!("{row}: "));
    let message = format!(
        "{}volume {}: {}{refusal}",
        field.unwrap_or_default(),
        intent.volume,
        row.unwrap_or_default()
    );
    (reason, message)
}

#[cfg(test)]
mod tests {
    use bascule_types::Bytes;

    use super::*;

    fn intent() -> VmIntent {
        let vm = serde_json::from_value(serde_json::json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {
                "name": "web", "namespace": "shop",
                "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e",
            },
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
                "disks": [
                    {"name": "root", "size": "1Gi"},
                    {"name": "data", "existing": {"name": "old.data"}},
                ],
            },
        }))
        .unwrap();
        crate::vm_intent::intent(&vm).unwrap()
    }

    #[test]
    fn a_disk_claimed_by_another_vm_is_reported_with_the_field_that_names_it() {
        let intent = intent();
        let name = intent.disks[2].row.clone();
        let change = Change::AttachDisk {
            name,
            vm: intent.uid,
        };
        let (reason, message) = refusal_condition(&intent, &change, &Refusal::NameTaken);
        assert_eq!(reason, reason::DISK_CLAIMED);
        assert!(
            message.starts_with("spec.disks[data].existing.name: volume san: shop/old.data: "),
            "{message}"
        );
    }

    /// The guest is started only when all images are there, which may take an hour.
    #[test]
    fn an_import_that_has_begun_is_no_longer_reported_as_waiting_for_its_secret() {
        let error = Some((reason::SECRET_UNAVAILABLE, "no Secret".to_owned()));
        let mut memory = PlannerMemory {
            error: error.clone(),
            ..PlannerMemory::default()
        };
        let node = || "node-1".to_owned();
        let disk = bascule_types::DiskId::from_bytes([1; 16]);
        let cancel = Action::CancelImport { node: node(), disk };
        remember_done(&mut memory, &cancel);
        assert_eq!(memory.error, error);
        let import = Action::Import {
            node: node(),
            owner: Owner {
                slot: bascule_types::SlotId(1),
                generation: bascule_types::Generation(1),
            },
            epoch: Epoch(1),
            disk,
            attempt: 1,
            source: bascule_operator_core::ImageSource::HostFile {
                name: "debian".to_owned(),
            },
            field: "spec.boot.kernel".to_owned(),
        };
        remember_done(&mut memory, &import);
        assert_eq!(memory.error, None);
    }

    #[test]
    fn a_disk_that_does_not_fit_on_the_volume_is_reported_with_its_field() {
        let intent = intent();
        let change = Change::CreateDisk {
            vm: intent.uid,
            name: intent.disks[1].row.clone(),
            size: Bytes::gib(1),
            role: intent.disks[1].role,
            importing: false,
        };
        let full = Refusal::Full {
            free: Bytes::mib(5),
            needed: Bytes::gib(1),
        };
        let (reason, message) = refusal_condition(&intent, &change, &full);
        assert_eq!(reason, reason::VOLUME_FULL);
        assert!(
            message.starts_with("spec.disks[root]: volume san: "),
            "{message}"
        );
    }
}
