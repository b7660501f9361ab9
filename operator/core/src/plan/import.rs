//! Disks, kernel and initrd: on the volume before the guest first starts.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_types::{Change, DiskRow, Owner, RedactedUrl};

use super::context::PlanContext;
use super::step::{Ready, ReportChange, Step};
use crate::observed::{ImportPhase, ImportView, RowView};
use crate::{Action, Condition, DiskIntent, FailedImports, ImageSource, Origin, Phase};

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
        self.imports_on(node, row)
            .any(|import| import.phase == ImportPhase::Running)
    }

    /// Ends the imports of this virtual machine's disks on `node`, and has those that failed forgotten.
    pub(super) fn cancel_imports(&self, node: &str, row: &RowView) -> Step {
        let mut step = Step::new();
        for import in self.imports_on(node, row) {
            step.push(Action::CancelImport {
                node: node.to_owned(),
                disk: import.disk,
            });
        }
        step
    }

    fn imports_on(&self, node: &str, row: &RowView) -> impl Iterator<Item = &ImportView> {
        let ours = move |import: &&ImportView| {
            let mut disks = row.disks.iter();
            import.node == node
                && disks.any(|r| r.disk == import.disk && r.vm == Some(self.intent.uid))
        };
        self.observed.imports.iter().filter(ours)
    }

    /// The next step for every disk that is not there yet. `node` owns the row.
    pub(super) fn import(&self, row: &RowView, node: &str, owner: Owner) -> Step {
        let mut step = Step::new().requeued_soon();
        // The last disk that failed decides the conditions; one that failed for good before all others.
        let mut shown: Option<(String, FailedImports)> = None;
        for disk in &self.intent.disks {
            match self.disk_row(row, disk) {
                None => step.push(self.make_disk(node, disk)),
                Some(r) if r.vm != Some(self.intent.uid) => {
                    step.push(self.attach_disk(node, disk));
                }
                Some(r) if r.importing => {
                    let import = self.import_on(node, r);
                    let failed = self.failed_imports(disk, import);
                    step.actions.extend(self.fill_disk(
                        row,
                        owner,
                        disk,
                        (r, node, import),
                        failed.as_ref(),
                    ));
                    let Some(failed) = failed else { continue };
                    step.change(ReportChange::ImportFailed(
                        disk.name.clone(),
                        failed.clone(),
                    ));
                    let runs = import.is_some_and(|i| i.phase == ImportPhase::Running);
                    let outranked = shown.as_ref().is_some_and(|(_, old)| old.next.is_none());
                    let is_shown = failed.next.is_none() || !outranked;
                    if is_shown && !runs {
                        shown = Some((complaint(disk, &failed.message), failed));
                    }
                }
                Some(_) => {}
            }
        }
        // The first action that fails is the last of a run: a missing Secret keeps no other disk waiting.
        step.actions.sort_by_key(needs_secret);
        let (phase, reason, message) = self.import_condition(shown);
        let imported = Condition::new(Some(false), reason, message.clone());
        step.change(ReportChange::Imported(imported));
        let ready = Ready::new(phase, false, reason, message);
        step.with_ready(self.or_last_error(ready))
    }

    fn import_condition(
        &self,
        failed: Option<(String, FailedImports)>,
    ) -> (Phase, &'static str, String) {
        match failed {
            None => {
                let message = format!("images are being copied to volume {}", self.intent.volume);
                (Phase::Importing, reason::IMPORTING, message)
            }
            Some((complaint, FailedImports { next: None, .. })) => {
                let message = format!("{complaint}; not tried again: {WAY_OUT}");
                (Phase::Failed, reason::IMAGE_REFUSED, message)
            }
            Some((complaint, FailedImports { count, .. })) => {
                let times = if count == 1 { "time" } else { "times" };
                let wait = import_backoff(count).as_secs();
                let message = format!(
                    "{complaint}; failed {count} {times}, tried again {wait} s after the last"
                );
                (Phase::Importing, reason::IMPORT_FAILED, message)
            }
        }
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

    fn import_on(&self, node: &str, disk: &DiskRow) -> Option<&ImportView> {
        let mut imports = self.observed.imports.iter();
        imports.find(|import| import.disk == disk.disk && import.node == node)
    }

    /// The failed attempts to import a disk, with one that its node has just reported.
    fn failed_imports(
        &self,
        disk: &DiskIntent,
        import: Option<&ImportView>,
    ) -> Option<FailedImports> {
        let known = self.observed.memory.failed_imports.get(&disk.name);
        let counted = known.map_or(0, |known| known.count);
        match import {
            Some(ImportView {
                attempt,
                phase: ImportPhase::Failed { message, is_final },
                ..
            }) if *attempt > counted => {
                let wait = import_backoff(*attempt);
                Some(FailedImports {
                    count: *attempt,
                    next: (!is_final).then(|| self.now.after(wait)),
                    message: message.clone(),
                })
            }
            _ => known.cloned(),
        }
    }

    fn fill_disk(
        &self,
        row: &RowView,
        owner: Owner,
        disk: &DiskIntent,
        (disk_row, node, import): (&DiskRow, &str, Option<&ImportView>),
        failed: Option<&FailedImports>,
    ) -> Option<Action> {
        let Origin::Image { source, .. } = &disk.origin else {
            // The requesting node's volume process is still zeroing it, or ended meanwhile: repeat it.
            return Some(self.make_disk(node, disk));
        };
        let id = disk_row.disk;
        match import.map(|import| &import.phase) {
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
            Some(ImportPhase::Failed { .. }) | None => {}
        }
        let attempt = match failed {
            None => 1,
            Some(FailedImports {
                count,
                next: Some(next),
                ..
            }) if *next <= self.now => count.saturating_add(1),
            Some(_) => return None,
        };
        Some(Action::Import {
            node: node.to_owned(),
            owner,
            epoch: row.epoch,
            disk: id,
            attempt,
            source: source.clone(),
            field: disk.source_field(),
        })
    }

    fn disk_row<'r>(&self, row: &'r RowView, disk: &DiskIntent) -> Option<&'r DiskRow> {
        row.disks.iter().find(|r| r.name == disk.row)
    }
}

const fn needs_secret(action: &Action) -> bool {
    matches!(action, Action::Import { source, .. } if source.needs_secret())
}

/// Names the field and where its image should come from.
fn complaint(disk: &DiskIntent, message: &str) -> String {
    let place = match &disk.origin {
        Origin::Image {
            source: ImageSource::Http { url, .. },
            ..
        } => RedactedUrl(url).to_string(),
        Origin::Image {
            source: ImageSource::HostFile { name },
            ..
        } => name.clone(),
        Origin::Blank { .. } | Origin::Existing => String::new(),
    };
    let field = disk.source_field();
    if message.contains(place.as_str()) {
        format!("{field}: {message}")
    } else {
        format!("{field}: {place}: {message}")
    }
}

/// What a user can do about an image that is refused for good.
const WAY_OUT: &str =
    "a source cannot be changed, so delete the VirtualMachine and create it with another image";
/// The wait after so many failed attempts: it doubles, so that an image with a wrong hash is not fetched all
/// day long.
fn import_backoff(failed: u32) -> Duration {
    // 7 doublings are more than the longest wait.
    let doublings = failed.saturating_sub(1).min(7);
    BACKOFF_MIN.saturating_mul(1 << doublings).min(BACKOFF_MAX)
}

/// A web server that is restarted is back.
const BACKOFF_MIN: Duration = Duration::from_secs(20);
/// Images are fetched a few dozen times a day at most.
const BACKOFF_MAX: Duration = Duration::from_secs(1800);

#[cfg(test)]
mod tests {
    use bascule_types::DiskRole;

    use super::*;

    #[test]
    fn the_wait_after_a_failed_import_doubles_up_to_half_an_hour() {
        let waits = [0, 1, 2, 3, 7, 8, 9, u32::MAX].map(|failed| import_backoff(failed).as_secs());
        assert_eq!(waits, [20, 20, 40, 80, 1280, 1800, 1800, 1800]);
    }

    #[test]
    fn a_complaint_shows_no_password_of_the_url() {
        let source = ImageSource::Http {
            url: "https://user:secret@images/k?signature=abc".to_owned(),
            digest: bascule_types::ImageDigest::Sha256(String::new()),
            ca_bundle: None,
            authorization_from: None,
        };
        let disk = DiskIntent {
            name: "kernel".to_owned(),
            row: bascule_types::RowName::new("shop/web").unwrap(),
            role: DiskRole::Kernel,
            origin: Origin::Image {
                size: bascule_types::Bytes::mib(1),
                source,
            },
            delete_with_vm: true,
            on_error: bascule_crds::OnError::Report,
        };
        let shown = complaint(&disk, "http status: 404");
        assert_eq!(
            shown,
            "spec.boot.kernel: https://images/k?…: http status: 404"
        );
    }
}
