//! The node's certificate: stores it, and checks whether it is valid and when to renew it.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use bascule_ipc::tls::{AUTHORITIES, BUNDLE, CERTIFICATE, KEY, TlsIdentity};
use bascule_pki::{holder, validity};
use time::OffsetDateTime;

use super::node_identity::Identity;
use crate::files;
use crate::paths::Paths;

/// One file to replace: path, contents, mode.
type Write = (PathBuf, Vec<u8>, u32);

/// Stores the node's identity and its certificate.
///
/// # Guarantees
/// A process that is killed at any moment leaves the old identity, the new one, or a state for which
/// [`is_usable`] is false; then the node enrolls again.
pub(crate) fn store(paths: &Paths, tls: &TlsIdentity, identity: &Identity) -> Result<()> {
    let held = holder(&tls.key, &tls.certificate, &tls.authorities);
    ensure!(
        held == Some(identity.node),
        "the certificate is not one of node {} under the authority that came with it",
        identity.node
    );
    for (path, contents, mode) in writes(paths, tls, identity)? {
        files::replace(&path, &contents, mode)?;
    }
    Ok(())
}

/// Lets `group` read the node's TLS identity: VM processes, for their migrations. A renewed one keeps that
/// ([`files::replace`]).
pub(crate) fn share(paths: &Paths, group: u32) -> Result<()> {
    let folder = paths.tls();
    for (path, mode) in [
        (folder.clone(), 0o750),
        (folder.join(BUNDLE), SHARED_SECRET),
        (folder.join(KEY), SHARED_SECRET),
    ] {
        let shared = chown(&path, None, Some(group))
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)));
        match shared {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done.with_context(|| format!("share {}", path.display()))?,
        }
    }
    Ok(())
}

/// The files that [`store`] writes, in order.
fn writes(paths: &Paths, tls: &TlsIdentity, identity: &Identity) -> Result<Vec<Write>> {
    let folder = paths.tls();
    let mut writes = vec![(folder.join(BUNDLE), tls.to_bundle().into_bytes(), SECRET)];
    // Only if they exist: processes of earlier releases read them, and no bundle.
    let three = [
        (KEY, &tls.key, SECRET),
        (AUTHORITIES, &tls.authorities, PUBLIC),
        (CERTIFICATE, &tls.certificate, PUBLIC),
    ];
    for (name, text, mode) in three {
        let path = folder.join(name);
        if path.exists() {
            writes.push((path, text.clone().into_bytes(), mode));
        }
    }
    writes.push((paths.identity(), identity.to_json()?, PUBLIC));
    Ok(writes)
}

/// Whether this node has an identity and a certificate that need no renewal yet.
pub(crate) fn is_current(paths: &Paths) -> bool {
    let now = OffsetDateTime::now_utc();
    own_certificate(paths)
        .is_some_and(|certificate| validity(&certificate, now).is_ok_and(|(_, due)| !due))
}

/// Whether this node has an identity and a certificate that is still valid.
pub(crate) fn is_usable(paths: &Paths) -> bool {
    let now = OffsetDateTime::now_utc();
    own_certificate(paths).is_some_and(|certificate| {
        validity(&certificate, now).is_ok_and(|(left, _)| !left.is_zero())
    })
}

/// The certificate, if it fits its key, its authority and this node's identity.
fn own_certificate(paths: &Paths) -> Option<String> {
    let tls = TlsIdentity::read(&paths.tls()).ok()?;
    let identity = Identity::load(paths).ok()??;
    let held = holder(&tls.key, &tls.certificate, &tls.authorities)?;
    (held == identity.node).then_some(tls.certificate)
}

const SECRET: u32 = 0o600;
const SHARED_SECRET: u32 = 0o640;
const PUBLIC: u32 = 0o644;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

    use bascule_pki::Authority;
    use bascule_types::{ClusterId, NodeUid};

    use super::*;

    #[test]
    fn a_shared_identity_can_be_read_by_its_group_and_so_can_its_successor() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI needs root");
            println!("skipped: needs root");
            return;
        }
        let case = Case::new();
        let bundle = case.paths().tls().join(BUNDLE);
        let replace = || files::replace(&bundle, b"key", SECRET).unwrap();
        let access = || {
            let found = fs::metadata(&bundle).unwrap();
            (found.gid(), found.mode() & 0o777)
        };
        replace();
        assert_eq!(access().1, 0o600);
        share(&case.paths(), 3000).unwrap();
        assert_eq!(access(), (3000, 0o640));
        replace();
        assert_eq!(access(), (3000, 0o640));
    }

    struct Case {
        folder: tempfile::TempDir,
        authority: Authority,
        identity: Identity,
    }

    impl Case {
        fn new() -> Self {
            let identity = Identity {
                node: NodeUid::random(),
                name: "n1".into(),
                cluster: ClusterId::random(),
            };
            Self {
                folder: tempfile::tempdir().unwrap(),
                authority: Authority::create("test").unwrap().0,
                identity,
            }
        }

        fn paths(&self) -> Paths {
            Paths::new(Path::new("/nowhere"), self.folder.path())
        }

        fn issue(&self, node: NodeUid) -> TlsIdentity {
            let leaf = self.authority.issue_node(node).unwrap();
            TlsIdentity {
                key: leaf.key_pem,
                certificate: leaf.certificate_pem,
                authorities: self.authority.certificate_pem().to_owned(),
            }
        }

        /// Writes the files of a release without bundles.
        fn write_three(&self, tls: &TlsIdentity) {
            let folder = self.paths().tls();
            fs::create_dir_all(&folder).unwrap();
            for (name, text) in [
                (KEY, &tls.key),
                (CERTIFICATE, &tls.certificate),
                (AUTHORITIES, &tls.authorities),
            ] {
                fs::write(folder.join(name), text).unwrap();
            }
        }

        /// Stores `tls` like a process that is killed during the write after `count` complete ones.
        fn store_and_die(&self, tls: &TlsIdentity, identity: &Identity, count: usize) {
            let writes = writes(&self.paths(), tls, identity).unwrap();
            let mut left = writes.into_iter();
            for (path, contents, mode) in left.by_ref().take(count) {
                files::replace(&path, &contents, mode).unwrap();
            }
            if let Some((path, contents, _)) = left.next() {
                let mut draft = path.into_os_string();
                draft.push(".new");
                fs::create_dir_all(Path::new(&draft).parent().unwrap()).unwrap();
                fs::write(draft, &contents[..contents.len() / 2]).unwrap();
            }
        }

        fn read(&self) -> TlsIdentity {
            TlsIdentity::read(&self.paths().tls()).unwrap()
        }
    }

    /// The key used to be replaced before its certificate. A daemon that was killed in between had a
    /// key and a certificate that did not fit, considered them current and could not serve TLS again.
    #[test]
    fn a_renewal_that_is_killed_after_any_write_leaves_the_old_or_the_new_identity() {
        for old_layout in [false, true] {
            for count in 0..=5 {
                let case = Case::new();
                let (old, new) = (
                    case.issue(case.identity.node),
                    case.issue(case.identity.node),
                );
                store(&case.paths(), &old, &case.identity).unwrap();
                if old_layout {
                    fs::remove_file(case.paths().tls().join(BUNDLE)).unwrap();
                    case.write_three(&old);
                }
                case.store_and_die(&new, &case.identity, count);
                let left = case.read();
                assert!(left == old || left == new, "after {count} writes");
                assert!(is_current(&case.paths()), "after {count} writes");
                store(&case.paths(), &new, &case.identity).unwrap();
                assert_eq!(case.read(), new);
            }
        }
    }

    #[test]
    fn a_first_enrollment_that_is_killed_after_any_write_is_repeated() {
        for count in 0..2 {
            let case = Case::new();
            case.store_and_die(&case.issue(case.identity.node), &case.identity, count);
            assert!(!is_usable(&case.paths()), "after {count} writes");
        }
    }

    /// A node that was deleted and created again has another UID.
    #[test]
    fn a_certificate_of_another_node_is_not_used() {
        let case = Case::new();
        store(
            &case.paths(),
            &case.issue(case.identity.node),
            &case.identity,
        )
        .unwrap();
        let again = Identity {
            node: NodeUid::random(),
            ..case.identity.clone()
        };
        case.store_and_die(&case.issue(again.node), &again, 1);
        assert!(!is_usable(&case.paths()));
        assert!(store(&case.paths(), &case.issue(case.identity.node), &again).is_err());
    }

    #[test]
    fn a_key_that_does_not_fit_the_certificate_is_not_used() {
        let case = Case::new();
        let (old, new) = (
            case.issue(case.identity.node),
            case.issue(case.identity.node),
        );
        case.write_three(&old);
        fs::write(case.paths().identity(), case.identity.to_json().unwrap()).unwrap();
        assert!(is_current(&case.paths()));
        fs::write(case.paths().tls().join(KEY), &new.key).unwrap();
        assert!(!is_current(&case.paths()) && !is_usable(&case.paths()));
        store(&case.paths(), &new, &case.identity).unwrap();
        let three = fs::read_to_string(case.paths().tls().join(CERTIFICATE)).unwrap();
        assert_eq!(three, new.certificate, "for processes of that release");
    }

    #[test]
    fn readers_never_see_a_mixture_of_old_and_new_identity() {
        let case = Case::new();
        let identities = [
            case.issue(case.identity.node),
            case.issue(case.identity.node),
        ];
        store(&case.paths(), &identities[0], &case.identity).unwrap();
        std::thread::scope(|scope| {
            let renewing = scope.spawn(|| {
                for round in 0..RENEWALS {
                    let next = &identities[round % 2];
                    store(&case.paths(), next, &case.identity).unwrap();
                }
            });
            while !renewing.is_finished() {
                assert!(identities.contains(&case.read()));
            }
        });
    }

    const RENEWALS: usize = 50;
}
