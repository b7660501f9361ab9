//! Identities: 16-byte UUIDs, one type each, so that a volume cannot be taken for a virtual machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// The identity with these 16 bytes, in the order in which a UUID is written.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            /// The 16 bytes, in the order in which a UUID is written.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                *self.0.as_bytes()
            }

            /// A fresh random identity (UUID version 4, RFC 9562).
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// Whether this is the all-zero UUID, which identifies nothing.
            #[must_use]
            pub const fn is_nil(self) -> bool {
                self.0.is_nil()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text)
                    .map(Self)
                    .map_err(|source| ParseIdError { what: stringify!($name), source })
            }
        }
    };
}

uuid_id!(
    /// A virtual machine: the Kubernetes UID of its `VirtualMachine` object, or a random one in
    /// embedded mode.
    VmUid
);
uuid_id!(
    /// A node: the UID of its Kubernetes Node object, or the one that `cert issue` chose.
    NodeUid
);
uuid_id!(
    /// A SharedVolume. Chosen at random by `format` and kept in the superblock.
    VolumeId
);
uuid_id!(
    /// The cluster that a volume is bound to: the UID of the `kube-system` namespace, or the
    /// certificate authority's own in embedded mode.
    ClusterId
);
uuid_id!(
    /// A virtual disk on a volume. Chosen by the coordinator.
    DiskId
);
uuid_id!(
    /// One attempt to migrate a virtual machine. Makes the ownership transfer idempotent.
    AttemptId
);

uuid_id!(
    /// One boot of a host's kernel, as in `/proc/sys/kernel/random/boot_id`; changes at every boot.
    BootId
);

/// The text is not a UUID.
#[derive(Debug, thiserror::Error)]
#[error("not a {what}: expected a UUID such as 6fa459ea-ee8a-4ca4-894e-db77e160355e")]
pub struct ParseIdError {
    what: &'static str,
    source: uuid::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_from_its_text_and_from_its_bytes() {
        let vm: VmUid = "6fa459ea-ee8a-4ca4-894e-db77e160355e".parse().unwrap();
        assert_eq!(vm.to_string(), "6fa459ea-ee8a-4ca4-894e-db77e160355e");
        assert_eq!(VmUid::from_bytes(vm.to_bytes()), vm);
        assert_eq!(
            serde_json::to_string(&vm).unwrap(),
            "\"6fa459ea-ee8a-4ca4-894e-db77e160355e\""
        );
    }

    #[test]
    fn a_text_that_is_not_a_uuid_is_refused_with_the_type_that_was_expected() {
        let error = "web".parse::<VolumeId>().unwrap_err();
        assert!(error.to_string().starts_with("not a VolumeId"), "{error}");
    }
}
