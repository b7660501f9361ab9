//! Disks, kernel and initrd: on the volume before the guest first starts.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_types::{Change, DiskRow, Owner};

use super::Planner;
use crate::observed::{ImportPhase, RowView};
use crate::{Action, Condition, DiskIntent, ImageSource, Origin, Phase};

impl Planner<'_> {
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
    pub(super) fn import(&mut self, row: &RowView, node: &str, owner: Owner) {
        let message = format!("images are being copied to volume {}", self.intent.volume);
        self.ready(Phase::Importing, false, reason::IMPORTING, message.clone());
        self.report.imported = Condition::new(Some(false), reason::IMPORTING, message);
        self.requeue_soon();
        for disk in &self.intent.disks {
            match self.disk_row(row, disk) {
                None => self.make_disk(node, disk),
                Some(r) if r.vm != Some(self.intent.uid) => self.attach_disk(node, disk),
                Some(r) if r.importing => self.fill_disk(row, node, owner, disk, r),
                Some(_) => {}
            }
        }
        self.report_error();
    }

    fn make_disk(&mut self, node: &str, disk: &DiskIntent) {
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
        self.push(Action::Change {
            via: node.to_owned(),
            change,
        });
    }

    fn attach_disk(&mut self, node: &str, disk: &DiskIntent) {
        let change = Change::AttachDisk {
            name: disk.row.clone(),
            vm: self.intent.uid,
        };
        self.push(Action::Change {
            via: node.to_owned(),
            change,
        });
    }

    fn fill_disk(
        &mut self,
        row: &RowView,
        node: &str,
        owner: Owner,
        disk: &DiskIntent,
        disk_row: &DiskRow,
    ) {
        let Origin::Image { source, .. } = &disk.origin else {
            // The asker's volume process is still zeroing it, or died while it was: ask again.
            return self.make_disk(node, disk);
        };
        let id = disk_row.disk;
        let begun = self.observed.memory.imports_begun.get(&id);
        let rested = begun.is_none_or(|at| self.now.since(*at) >= IMPORT_RETRY);
        let import = self
            .observed
            .imports
            .iter()
            .find(|i| i.disk == id && i.node == node);
        let again = match import.map(|import| &import.phase) {
            Some(ImportPhase::Running) => false,
            Some(ImportPhase::Complete { length }) => {
                let change = Change::FinishImport {
                    disk: id,
                    length: Some(*length),
                };
                self.push(Action::Change {
                    via: node.to_owned(),
                    change,
                });
                false
            }
            Some(ImportPhase::Failed { message }) => {
                let message = complaint(disk, source, message);
                self.ready(
                    Phase::Importing,
                    false,
                    reason::IMPORT_FAILED,
                    message.clone(),
                );
                self.report.imported = Condition::new(Some(false), reason::IMPORT_FAILED, message);
                rested
            }
            None => true,
        };
        if again {
            self.push(Action::Import {
                node: node.to_owned(),
                owner,
                epoch: row.epoch,
                disk: id,
                source: source.clone(),
            });
        }
    }

    fn disk_row<'r>(&self, row: &'r RowView, disk: &DiskIntent) -> Option<&'r DiskRow> {
        row.disks.iter().find(|r| r.name == disk.row)
    }
}

/// Names the field and where its image should come from.
fn complaint(disk: &DiskIntent, source: &ImageSource, message: &str) -> String {
    let place = match source {
        ImageSource::Http { url, .. } => url,
        ImageSource::HostFile { name } => name,
    };
    let field = disk.field();
    if message.contains(place.as_str()) {
        format!("{field}: {message}")
    } else {
        format!("{field}: {place}: {message}")
    }
}

/// How long a failed import rests: a web server that is down is not asked every second.
const IMPORT_RETRY: Duration = Duration::from_secs(20);
