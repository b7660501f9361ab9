//! Kernel structures inside a saved state: their bytes, as base64 in the JSON.

use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The bytes of a `T` that the kernel filled in. For a sized `T` there are exactly as many as it
/// has; this is checked when they are read. x86-64 is little-endian, so that the bytes are too.
pub(crate) struct Blob<T: ?Sized> {
    bytes: Vec<u8>,
    of: PhantomData<T>,
}

impl<T: IntoBytes + FromBytes + Immutable> Blob<T> {
    /// The bytes of `value`.
    pub(crate) fn of(value: &T) -> Self {
        Self {
            bytes: value.as_bytes().to_vec(),
            of: PhantomData,
        }
    }

    pub(crate) fn get(&self) -> T {
        T::read_from_bytes(&self.bytes).unwrap_or_else(|_| T::new_zeroed())
    }
}

impl Blob<[u8]> {
    /// These bytes, of any number.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            of: PhantomData,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// How many bytes there must be.
pub(crate) trait BlobSize {
    /// `None` for any number.
    const SIZE: Option<usize>;
}

impl BlobSize for [u8] {
    const SIZE: Option<usize> = None;
}

impl<T: FromBytes> BlobSize for T {
    const SIZE: Option<usize> = Some(size_of::<T>());
}

impl<T: ?Sized> Serialize for Blob<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.bytes))
    }
}

impl<'de, T: ?Sized + BlobSize> Deserialize<'de> for Blob<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(D::Error::custom)?;
        match T::SIZE {
            Some(size) if size != bytes.len() => Err(D::Error::custom(format!(
                "{} bytes where {size} belong",
                bytes.len()
            ))),
            _ => Ok(Self {
                bytes,
                of: PhantomData,
            }),
        }
    }
}

impl<T: ?Sized> Clone for Blob<T> {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes.clone(),
            of: PhantomData,
        }
    }
}

impl<T: ?Sized> PartialEq for Blob<T> {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl<T: ?Sized> fmt::Debug for Blob<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({} bytes)", self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_mp_state;

    #[test]
    fn a_structure_of_the_wrong_length_is_refused() {
        let right = serde_json::to_string(&Blob::of(&kvm_mp_state { mp_state: 3 })).unwrap();
        assert_eq!(right, "\"AwAAAA==\"");
        let back: Blob<kvm_mp_state> = serde_json::from_str(&right).unwrap();
        assert_eq!(back.get().mp_state, 3);
        let wrong = serde_json::from_str::<Blob<kvm_mp_state>>("\"AwAAAAA=\"").unwrap_err();
        assert!(
            wrong.to_string().starts_with("5 bytes where 4 belong"),
            "{wrong}"
        );
    }
}
