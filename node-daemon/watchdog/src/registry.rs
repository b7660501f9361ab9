//! Which volumes are enlisted, and what their gate pages show.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bascule_types::{BootTime, VolumeId};
use bascule_volume_gate::{GateError, GateReader, boot_time_now};
use bascule_volume_protocol::Rules;
use bascule_volume_protocol::watchdog_policy::{Decision, Enlisted};

use crate::persist::{PersistError, Store};

/// The enlisted volumes with their gate pages.
#[derive(Debug)]
pub struct Registry {
    store: Store,
    enlisted: Enlisted,
    pages: BTreeMap<VolumeId, Page>,
}

#[derive(Debug)]
struct Page {
    path: PathBuf,
    /// None if it could not be read when this process started: counts as a lapsed lease.
    reader: Option<GateReader>,
}

/// A volume was not enlisted: no writer may be opened on it.
#[derive(Debug, thiserror::Error)]
pub enum EnlistRefused {
    /// Its gate page cannot be used.
    #[error("its gate page cannot be read")]
    Page(#[from] GateError),
    /// The page is another volume's.
    #[error("the gate page at {path} is for volume {found}")]
    OtherVolume {
        /// The page.
        path: PathBuf,
        /// Its volume.
        found: VolumeId,
    },
    /// The lease is over: to enlist the volume would reset the node.
    #[error("the volume's lease is not valid")]
    NoLease,
    /// The list could not be saved.
    #[error("the list of enlisted volumes cannot be saved")]
    Persist(#[from] PersistError),
}

impl Registry {
    /// What an earlier process of this boot enlisted.
    ///
    /// # Errors
    /// [`PersistError`]: which volumes have writers is unknown, so nothing may be petted.
    pub fn load(store: Store) -> Result<Self, PersistError> {
        let mut enlisted = Enlisted::new(Rules::ENFORCED);
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
            enlisted,
            pages,
        })
    }

    /// Enlist a volume, durably. Idempotent; a page of another path replaces the earlier one.
    ///
    /// # Errors
    /// [`EnlistRefused`]; nothing is changed then.
    pub fn enlist(&mut self, volume: VolumeId, path: &Path) -> Result<(), EnlistRefused> {
        let reader = GateReader::open(path)?;
        if reader.volume() != volume {
            return Err(EnlistRefused::OtherVolume {
                path: path.to_owned(),
                found: reader.volume(),
            });
        }
        let known = self.pages.contains_key(&volume);
        if !known && !reader.view().lease_is_valid(boot_time_now()) {
            return Err(EnlistRefused::NoLease);
        }
        let mut paths = self.paths();
        // Clients repeat themselves every second: only a change is worth a write.
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

    /// Withdraw a volume: its gates are closed and every submitted write has completed.
    ///
    /// # Errors
    /// [`PersistError`]; the volume is then still enlisted.
    pub fn withdraw(&mut self, volume: VolumeId) -> Result<(), PersistError> {
        let mut paths = self.paths();
        if paths.remove(&volume).is_some() {
            self.store.save(&paths)?;
            self.pages.remove(&volume);
            self.enlisted = self.enlisted.clone().withdraw(volume);
        }
        Ok(())
    }

    /// The enlisted volumes.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.enlisted.volumes().collect()
    }

    /// Whether to pet at `now`, which was taken before this call.
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
