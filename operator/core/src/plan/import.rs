//! Disks, kernel and initrd: on the volume before the guest first starts.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_types::{Change, DiskRole, DiskRow, Owner, RedactedUrl};

use super::context::PlanContext;
use super::step::{Ready, ReportChange, Step};
use crate::observed::{ImportPhase, RowView};
use crate::{Action, Condition, DiskIntent, ImageSource, Origin, Phase};

impl PlanContext<'_> {
    /// Whether every disk is there, complete, and this virtual machine's.
    pub(super) fn imported(&self, row: &RowView) -> bool {
        self.intent.disks.iter().all(|disk| {
            self.disk_row(row, disk)
                .is_some_and(|r| !r.importing && r.vm == Some(self.intent.uid))
        })
    }

    /// Whether a disk of this virtual machine is being filled on `node`.
    pub(super) fn import_runs_on(&self, node: &str, row: &RowView) -> bool {
        self.observed.imports.iter().any(|import| {
            import.node == node
                && import.phase == ImportPhase::Running
                && row.disks.iter().any(|disk| disk.disk == import.disk)
        })
    }

    /// The next step for every disk that is not there yet. `node` owns the row.
    pub(super) fn import(&self, row: &RowView, node: &str, owner: Owner) -> Step {
        let mut step = Step::new().requeued_soon();
        // The last disk that failed decides the conditions; one that failed for good before all others.
        let mut failure: Option<ImportFailure> = None;
        for disk in &self.intent.disks {
            match self.disk_row(row, disk) {
                None => step.push(self.make_disk(node, disk)),
                Some(r) if r.vm != Some(self.intent.uid) => {
                    step.push(self.attach_disk(node, disk));
                }
                Some(r) if r.importing => {
                    let failed = self.import_failure(node, disk, r);
                    failure = failed
                        .filter(|new| {
                            new.is_final || !failure.as_ref().is_some_and(|old| old.is_final)
                        })
                        .or(failure);
                    step.actions
                        .extend(self.fill_disk(row, node, owner, disk, r));
                }
                Some(_) => {}
            }
        }
        let (phase, reason, message) = match failure {
            None => {
                let message = format!("images are being copied to volume {}", self.intent.volume);
                (Phase::Importing, reason::IMPORTING, message)
            }
            Some(ImportFailure {
                message,
                is_final: false,
            }) => (Phase::Importing, reason::IMPORT_FAILED, message),
            Some(ImportFailure { message, .. }) => {
                let message = format!("{message}; not tried again: {WAY_OUT}");
                (Phase::Failed, reason::IMAGE_REFUSED, message)
            }
        };
        let imported = Condition::new(Some(false), reason, message.clone());
        step.change(ReportChange::Imported(imported));
        let ready = Ready::new(phase, false, reason, message);
        step.with_ready(self.or_last_error(ready))
    }

    fn make_disk(&self, node: &str, disk: &DiskIntent) -> Action {
        let (size, importing) = match &disk.origin {
            Origin::Existing => return self.attach_disk(node, disk),
            Origin::Blank { size } => (*size, false),
            Origin::Image { size, .. } => (*size, true),
        };
        let change = Change::CreateDisk {
            vm: self.intent.uid,
            name: disk.row.clone(),
            size,
            role: disk.role,
            importing,
        };
        Action::Change {
            via: node.to_owned(),
            change,
        }
    }

    fn attach_disk(&self, node: &str, disk: &DiskIntent) -> Action {
        let change = Change::AttachDisk {
            name: disk.row.clone(),
            vm: self.intent.uid,
        };
        Action::Change {
            via: node.to_owned(),
            change,
        }
    }

    fn import_on(&self, node: &str, disk: &DiskRow) -> Option<&ImportPhase> {
        self.observed
            .imports
            .iter()
            .find(|import| import.disk == disk.disk && import.node == node)
            .map(|import| &import.phase)
    }

    /// Why the import of a disk on `node` failed, if it did.
    fn import_failure(
        &self,
        node: &str,
        disk: &DiskIntent,
        disk_row: &DiskRow,
    ) -> Option<ImportFailure> {
        let Origin::Image { source, .. } = &disk.origin else {
            return None;
        };
        match self.import_on(node, disk_row)? {
            ImportPhase::Failed { message, is_final } => Some(ImportFailure {
                message: complaint(disk, source, message),
                is_final: *is_final,
            }),
            ImportPhase::Running | ImportPhase::Complete { .. } => None,
        }
    }

    fn fill_disk(
        &self,
        row: &RowView,
        node: &str,
        owner: Owner,
        disk: &DiskIntent,
        disk_row: &DiskRow,
    ) -> Option<Action> {
        let Origin::Image { source, .. } = &disk.origin else {
            // The requesting node's volume process is still zeroing it, or ended meanwhile: repeat it.
            return Some(self.make_disk(node, disk));
        };
        let id = disk_row.disk;
        match self.import_on(node, disk_row) {
            Some(ImportPhase::Running) => return None,
            Some(ImportPhase::Complete { length }) => {
                let change = Change::FinishImport {
                    disk: id,
                    length: Some(*length),
                };
                return Some(Action::Change {
                    via: node.to_owned(),
                    change,
                });
            }
            Some(ImportPhase::Failed { is_final: true, .. }) => return None,
            Some(ImportPhase::Failed { .. }) => {
                let begun = self.observed.memory.imports_begun.get(&id);
                if begun.is_some_and(|at| self.now.since(*at) < IMPORT_RETRY) {
                    return None;
                }
            }
            None => {}
        }
        Some(Action::Import {
            node: node.to_owned(),
            owner,
            epoch: row.epoch,
            disk: id,
            source: source.clone(),
        })
    }

    fn disk_row<'r>(&self, row: &'r RowView, disk: &DiskIntent) -> Option<&'r DiskRow> {
        row.disks.iter().find(|r| r.name == disk.row)
    }
}

/// Why a disk could not be filled.
struct ImportFailure {
    /// For users.
    message: String,
    /// Whether the same source fails again.
    is_final: bool,
}

/// Names the field and where its image should come from.
fn complaint(disk: &DiskIntent, source: &ImageSource, message: &str) -> String {
    let place = match source {
        ImageSource::Http { url, .. } => RedactedUrl(url).to_string(),
        ImageSource::HostFile { name } => name.clone(),
    };
    let field = match disk.role {
        DiskRole::Data => format!("{}.source", disk.field()),
        // The field of a boot image is its source.
        DiskRole::Kernel | DiskRole::Initrd => disk.field(),
    };
    if message.contains(place.as_str()) {
        format!("{field}: {message}")
    } else {
        format!("{field}: {place}: {message}")
    }
}

/// What a user can do about an image that is refused for good.
const WAY_OUT: &str =
    "a source cannot be changed, so delete the VirtualMachine and create it with another image";
/// Wait after a failed import, so that a web server that is down is not requested every second.
const IMPORT_RETRY: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_shows_no_password_of_the_url() {
        let source = ImageSource::Http {
            url: "https://user:secret@images/k?signature=abc".to_owned(),
            digest: bascule_types::ImageDigest::Sha256(String::new()),
        };
        let disk = DiskIntent {
            name: "kernel".to_owned(),
            row: bascule_types::RowName::new("shop/web").unwrap(),
            role: DiskRole::Kernel,
            origin: Origin::Existing,
            delete_with_vm: true,
        };
        let shown = complaint(&disk, &source, "http status: 404");
        assert_eq!(
            shown,
            "spec.boot.kernel: https://images/k?…: http status: 404"
        );
    }
}
