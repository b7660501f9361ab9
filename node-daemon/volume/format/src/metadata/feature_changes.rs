//! Decisions about features: which can be raised, and who may join afterwards.
//!
//! # Guarantees
//! The present generation of every slot that has joined was seen with every feature that is raised: a feature is
//! raised only on the newest record of that generation, and a generation joins only on a record of its own.

use bascule_types::{Owner, Refusal};

use super::Metadata;
use super::decide::{Context, Witness};
use crate::broken;
use crate::features::Features;
use crate::metadata_records::MetaRecord;
use crate::rules::Rules;

impl Metadata {
    /// The record that raises what can be raised of `supported`, the features of the coordinator; none if that is
    /// nothing. A slot that never joined has no say: it joins with every feature that is raised then.
    #[must_use]
    pub fn raise_features(
        &self,
        supported: Features,
        witness: &dyn Witness,
        rules: Rules,
    ) -> Option<MetaRecord> {
        let joined = self.slots.values().filter(|row| row.generation.0 > 0);
        let mut all = supported.without(self.features);
        if !broken!(rules, RaiseWithoutAsking) {
            for row in joined {
                all = all.common(features_of(row.owner(), witness, rules));
            }
        }
        let is_possible =
            !all.is_empty() && (!self.features.is_empty() || self.room_for_reserved().is_ok());
        is_possible.then_some(MetaRecord::Features(all))
    }

    /// Refuses a generation whose own newest heartbeat lacks a raised feature, or was not read yet.
    pub(super) fn check_features(
        &self,
        joining: Owner,
        context: &Context<'_>,
    ) -> Result<(), Refusal> {
        if self.features.is_empty() || broken!(context.rules, JoinWithoutFeatures) {
            return Ok(());
        }
        let seen = context.witness.newest_record(joining.slot);
        let own = seen.filter(|(owner, _)| *owner == joining);
        let known = own.map(|(_, features)| features).unwrap_or_default();
        let missing = self.features.without(known);
        if missing.is_empty() {
            Ok(())
        } else {
            let features = missing.bits();
            Err(Refusal::FeaturesMissing { features })
        }
    }
}

/// The features in the newest record of the slot, if the generation that has joined wrote it.
fn features_of(joined: Owner, witness: &dyn Witness, rules: Rules) -> Features {
    let newest = witness.newest_record(joined.slot);
    let counts = |owner: &Owner| *owner == joined || broken!(rules, OtherGenerationHasFeatures);
    let newest = newest.filter(|(owner, _)| counts(owner));
    newest.map(|(_, features)| features).unwrap_or_default()
}
