//! Hashing an image while it passes, with the hash that its publisher chose.

use anyhow::{Result, bail};
use bascule_types::ImageDigest;
use sha2::{Digest, Sha256, Sha512};

/// The hash of an image, so far, and what it must be.
pub(super) struct ImageHash {
    wanted: ImageDigest,
    hasher: Hasher,
}

enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl ImageHash {
    pub(super) fn new(wanted: &ImageDigest) -> Self {
        let hasher = match wanted {
            ImageDigest::Sha256(_) => Hasher::Sha256(Sha256::new()),
            ImageDigest::Sha512(_) => Hasher::Sha512(Sha512::new()),
        };
        Self {
            wanted: wanted.clone(),
            hasher,
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match &mut self.hasher {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// Fails unless the whole image has the hash that it must have. `place` says where the image is from.
    pub(super) fn check(self, place: &str) -> Result<()> {
        let found = match self.hasher {
            Hasher::Sha256(hasher) => hexadecimal(&hasher.finalize()),
            Hasher::Sha512(hasher) => hexadecimal(&hasher.finalize()),
        };
        let wanted = self.wanted.digits();
        if !found.eq_ignore_ascii_case(wanted) {
            let algorithm = self.wanted.algorithm();
            bail!("{place}: its {algorithm} is {found}, and {wanted} is wanted");
        }
        Ok(())
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: &ImageDigest) -> Result<()> {
        let mut hash = ImageHash::new(wanted);
        hash.update(b"a");
        hash.update(b"bc");
        hash.check("http://images/k")
    }

    /// The digests of "abc" in FIPS 180-2, appendices B.1 and C.1.
    #[test]
    fn both_hashes_are_checked_in_either_case() {
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let sha512 = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                      2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
        check(&ImageDigest::Sha256(sha256.to_owned())).unwrap();
        check(&ImageDigest::Sha256(sha256.to_uppercase())).unwrap();
        check(&ImageDigest::Sha512(sha512.to_owned())).unwrap();
        check(&ImageDigest::Sha512(sha256.to_owned())).unwrap_err();
        check(&ImageDigest::Sha256(sha512.to_owned())).unwrap_err();
    }

    #[test]
    fn a_wrong_hash_is_named_with_the_right_one() {
        let error = check(&ImageDigest::Sha256("00".repeat(32))).unwrap_err();
        let error = error.to_string();
        for part in ["http://images/k", "SHA-256 is ba7816bf", &"00".repeat(32)] {
            assert!(error.contains(part), "{error}");
        }
    }
}
