//! The enlisted volumes, and the lease expiry that each one's gate page shows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bascule_types::{BootTime, VolumeId};
use bascule_volume_gate::{GateError, GateReader};
use bascule_volume_protocol::watchdog_policy::{Decision, Enlisted};
use bascule_volume_protocol::{Rules, broken};

use crate::enlistment_store::{EnlistmentStore, StoreError};

/// The enlisted volumes with their gate pages.
#[derive(Debug)]
pub struct EnlistedVolumes {
    store: Box<dyn EnlistmentStore>,
    rules: Rules,
    enlisted: Enlisted,
    pages: BTreeMap<VolumeId, Page>,
    /// When the newest request that was carried out for a volume was decided, of volumes that clients of this
    /// process have enlisted. No request of a client of an earlier process comes after its end.
    newest: BTreeMap<VolumeId, BootTime>,
}

#[derive(Debug)]
struct Page {
    path: PathBuf,
    /// `None` if the page could not be read when this process started: counts as an expired lease.
    reader: Option<GateReader>,
}

/// Why a volume was not enlisted. The client must not open a writer on it.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum EnlistRefused {
    /// The gate page cannot be opened.
    #[error("the gate page of the volume cannot be read")]
    Page(#[from] GateError),
    /// The gate page belongs to another volume.
    #[error("the gate page at {path} is for volume {found}")]
    OtherVolume {
        path: PathBuf,
        /// The volume that the page belongs to.
        found: VolumeId,
    },
    /// The lease has expired: enlisting the volume would reset the node.
    #[error("the volume's lease is not valid")]
    NoLease,
    /// The list could not be written to `watchdog.json`.
    #[error("the list of enlisted volumes cannot be saved")]
    Persist(#[from] StoreError),
}

impl EnlistedVolumes {
    /// Loads the volumes that an earlier process of this boot enlisted. `rules`: all of them; tests break one
    /// at a time.
    ///
    /// # Errors
    /// [`StoreError`]: which volumes have writers is then unknown, so no device may be armed.
    pub fn load(store: Box<dyn EnlistmentStore>, rules: Rules) -> Result<Self, StoreError> {
        let mut enlisted = Enlisted::new(rules);
        let mut pages = BTreeMap::new();
        for (volume, path) in store.load()? {
            let reader = match GateReader::open(&path) {
                Ok(reader) if reader.volume() == volume => Some(reader),
                Ok(_) => None,
                Err(error) => {
                    tracing::error!(%volume, error = %error, "cannot read an enlisted gate page");
                    None
                }
            };
            enlisted = enlisted.enlist(volume);
            pages.insert(volume, Page { path, reader });
        }
        Ok(Self {
            store,
            rules,
            enlisted,
            pages,
            newest: BTreeMap::new(),
        })
    }

    /// Whether a request that was decided at `decided_at` comes after a later one: its client has given it up, and
    /// has decided otherwise since.
    #[must_use]
    pub fn is_outdated(&self, volume: VolumeId, decided_at: Option<BootTime>) -> bool {
        let newest = self.newest.get(&volume);
        let outdated = newest
            .zip(decided_at)
            .is_some_and(|(newest, at)| at < *newest);
        outdated && !broken!(self.rules, OutdatedRequestCounts)
    }

    /// Notes that a request was carried out. A volume that was never enlisted is not remembered.
    pub fn carried_out(&mut self, volume: VolumeId, decided_at: Option<BootTime>) {
        let Some(at) = decided_at else { return };
        if self.pages.contains_key(&volume) || self.newest.contains_key(&volume) {
            let newest = self.newest.entry(volume).or_default();
            *newest = at.max(*newest);
        }
    }

    /// Enlists a volume and saves the list. Idempotent; a gate page at another path replaces the
    /// earlier one. `now` is the present time. `lease_until` is the expiry of a lease that the page does not
    /// show yet: keepalives stop until it does.
    ///
    /// # Errors
    /// [`EnlistRefused`]; the list is then unchanged.
    pub fn enlist(
        &mut self,
        volume: VolumeId,
        path: &Path,
        now: BootTime,
        lease_until: Option<BootTime>,
    ) -> Result<(), EnlistRefused> {
        let reader = GateReader::open(path)?;
        if reader.volume() != volume {
            return Err(EnlistRefused::OtherVolume {
                path: path.to_owned(),
                found: reader.volume(),
            });
        }
        let known = self.pages.contains_key(&volume);
        let has_lease = reader.view().lease_is_valid(now) || lease_until.is_some_and(|t| now < t);
        if !known && !has_lease {
            return Err(EnlistRefused::NoLease);
        }
        let mut paths = self.paths();
        // Clients repeat the request every second: the list is saved only when it changes.
        if paths.insert(volume, path.to_owned()).as_deref() != Some(path) {
            self.store.save(&paths)?;
        }
        let page = Page {
            path: path.to_owned(),
            reader: Some(reader),
        };
        self.pages.insert(volume, page);
        self.enlisted = self.enlisted.clone().enlist(volume);
        Ok(())
    }

    /// Withdraws a volume whose gates are closed and whose submitted writes have all completed.
    ///
    /// # Errors
    /// [`StoreError`]; the volume is then still enlisted.
    pub fn withdraw(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        let mut paths = self.paths();
        if paths.remove(&volume).is_some() {
            self.store.save(&paths)?;
            self.pages.remove(&volume);
            self.enlisted = self.enlisted.clone().withdraw(volume);
        }
        Ok(())
    }

    /// The ids of the enlisted volumes.
    #[must_use]
    pub fn ids(&self) -> Vec<VolumeId> {
        self.enlisted.volumes().collect()
    }

    /// Whether to send a keepalive. `now` must have been read before this call.
    #[must_use]
    pub fn decide(&self, now: BootTime) -> Decision {
        self.enlisted.decide(now, |volume| {
            let reader = self.pages.get(&volume)?.reader.as_ref()?;
            let view = reader.view();
            view.owner.map(|_| view.expiry)
        })
    }

    fn paths(&self) -> BTreeMap<VolumeId, PathBuf> {
        let pages = self.pages.iter();
        pages.map(|(id, page)| (*id, page.path.clone())).collect()
    }
}
