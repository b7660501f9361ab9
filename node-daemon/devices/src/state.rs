//! The saved state of a device: a kind, a version and a JSON body.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The state of one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct DeviceState {
    /// What the body describes, such as `virtio-blk`.
    pub kind: String,
    /// The version of the body's layout, from 1, counted per kind.
    pub version: u32,
    pub body: serde_json::Value,
}

/// A state that a device cannot load.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum RestoreError {
    /// The state belongs to another kind of device.
    #[error("{device}: state of kind {found:?} where {expected:?} is needed")]
    Kind {
        device: String,
        expected: String,
        found: String,
    },
    /// This release does not know the version of the state.
    #[error("{device}: state version {found} is not known, the newest known is {newest}")]
    Version {
        device: String,
        newest: u32,
        found: u32,
    },
    /// The body cannot be parsed.
    #[error("{device}: malformed state")]
    Malformed {
        device: String,
        #[source]
        source: serde_json::Error,
    },
    /// The state contradicts the device's configuration or itself.
    #[error("{device}: state does not fit: {reason}")]
    DoesNotFit { device: String, reason: String },
}

impl DeviceState {
    /// A state of `kind` in layout `version` with this body.
    ///
    /// # Panics
    /// When the body cannot be expressed in JSON, which for our plain structs cannot happen.
    #[must_use]
    pub fn new<T: Serialize>(kind: &str, version: u32, body: &T) -> Self {
        let body = serde_json::to_value(body).expect("device state is plain data");
        Self {
            kind: kind.to_owned(),
            version,
            body,
        }
    }

    /// The body, if this is a state of `kind` in layout `version` or an earlier one.
    ///
    /// # Errors
    /// [`RestoreError`] otherwise, naming `device`.
    pub fn parse<T: DeserializeOwned>(
        &self,
        device: &str,
        kind: &str,
        version: u32,
    ) -> Result<T, RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::Kind {
                device: device.to_owned(),
                expected: kind.to_owned(),
                found: self.kind.clone(),
            });
        }
        if self.version == 0 || self.version > version {
            return Err(RestoreError::Version {
                device: device.to_owned(),
                newest: version,
                found: self.version,
            });
        }
        T::deserialize(&self.body).map_err(|source| RestoreError::Malformed {
            device: device.to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_another_kind_or_version_is_refused_by_name() {
        let state = DeviceState::new("virtio-rng", 1, &7_u32);
        assert_eq!(state.parse::<u32>("rng0", "virtio-rng", 1).unwrap(), 7);
        let kind = state.parse::<u32>("blk0", "virtio-blk", 1).unwrap_err();
        assert!(
            kind.to_string().starts_with("blk0: state of kind"),
            "{kind}"
        );
        assert_eq!(state.parse::<u32>("rng0", "virtio-rng", 2).unwrap(), 7);
        for version in [0, 2] {
            let state = DeviceState::new("virtio-rng", version, &7_u32);
            let refused = state.parse::<u32>("rng0", "virtio-rng", 1).unwrap_err();
            let named = format!("version {version} is not known");
            assert!(refused.to_string().contains(&named), "{refused}");
        }
        let body = state.parse::<String>("rng0", "virtio-rng", 1).unwrap_err();
        assert!(matches!(body, RestoreError::Malformed { .. }));
    }
}
