//! The socket on which `bascule-volume` processes enlist their volumes.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bascule_ipc::volume::WatchdogKind;
use bascule_ipc::watchdog::{Request, Response};
use bascule_ipc::{AcceptErrors, Connection};
use bascule_volume_gate::Clock;

use crate::keepalive::{Shared, State};
use crate::watchdog_device::Kind;

/// Listens at `path`, in place of the socket of an earlier process.
///
/// # Errors
/// Those of the socket.
///
/// # Assumes
/// The caller holds the lock that makes this process the only one.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves clients, each on its own thread, until the process ends.
pub fn serve(listener: &UnixListener, shared: &Arc<Shared>) {
    let open = Arc::new(AtomicUsize::new(0));
    let mut errors = AcceptErrors::default();
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                if errors.pause(&error) {
                    tracing::warn!(error = %error, "cannot accept a connection");
                }
                continue;
            }
        };
        errors.accepted();
        if open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("closed a connection: too many are open");
            continue;
        }
        let (shared, counted) = (Arc::clone(shared), OpenGuard(Arc::clone(&open)));
        let spawned = std::thread::Builder::new()
            .name("client".to_owned())
            .spawn(move || {
                let _counted = counted;
                converse(stream, &shared);
            });
        if let Err(error) = spawned {
            tracing::warn!(error = %error, "cannot serve a connection");
        }
    }
}

/// Serves one client until it disconnects. Its volumes stay enlisted after that.
fn converse(stream: UnixStream, shared: &Shared) {
    let ended = Connection::open(stream, TIMEOUT).and_then(|mut connection| {
        connection.set_timeout(None)?;
        loop {
            let (request, _) = connection.recv::<Request>()?;
            let disarm = matches!(request, Request::Disarm);
            let answering = shared.begin_answer();
            let response = answer(request, shared);
            let sent = connection.send(&response, &[]);
            drop(answering);
            // After the answer was sent, because the process exits.
            if disarm && matches!(response, Response::Status { .. }) {
                shared.end();
            }
            sent?;
        }
    });
    match ended {
        Ok(()) => {}
        // Also before the greeting: the node's daemon connects to find out whether this process listens.
        Err(error) if error.kind() == bascule_ipc::Kind::Gone => {
            tracing::debug!(%error, "a client has gone")
        }
        Err(error) => tracing::warn!(error = %error, "the connection of a client failed"),
    }
}

/// Grants or refuses one request. A granted request to disarm is carried out by [`Shared::end`].
pub fn answer(request: Request, shared: &Shared) -> Response {
    let response = decide(request, &mut shared.lock(), shared.clock.as_ref());
    shared.wake();
    response
}

fn decide(request: Request, state: &mut State, clock: &dyn Clock) -> Response {
    let order = match &request {
        Request::Enlist {
            volume, decided_at, ..
        }
        | Request::Withdraw { volume, decided_at } => Some((*volume, *decided_at)),
        Request::Status | Request::Disarm => None,
    };
    let outdated = order.is_some_and(|(volume, at)| state.volumes.is_outdated(volume, at));
    let done = match request {
        _ if outdated => Err("a later request for this volume was carried out".to_owned()),
        Request::Status => Ok(()),
        Request::Enlist { .. } if state.disarming => {
            Err("bascule-watchdog is disarming its device and exits: start it again".to_owned())
        }
        Request::Enlist {
            volume,
            gate_page,
            lease_until,
            ..
        } => {
            let enlisted = (state.volumes).enlist(volume, &gate_page, clock.now(), lease_until);
            enlisted.map_err(|error| describe(&error))
        }
        Request::Withdraw { volume, .. } => {
            let withdrawn = state.volumes.withdraw(volume);
            withdrawn.map_err(|error| describe(&error))
        }
        Request::Disarm if state.volumes.ids().is_empty() => {
            state.disarming = true;
            Ok(())
        }
        Request::Disarm => Err("a volume with open writers is enlisted".to_owned()),
    };
    if let (Ok(()), Some((volume, decided_at))) = (&done, order) {
        state.volumes.carried_out(volume, decided_at);
    }
    match done {
        Ok(()) => Response::Status {
            kind: match state.kind {
                Kind::Hardware => WatchdogKind::Hardware,
                Kind::Soft => WatchdogKind::Soft,
                Kind::None => WatchdogKind::None,
            },
            timeout_ms: u64::try_from(state.timeout.as_millis()).unwrap_or(u64::MAX),
            enlisted: state.volumes.ids(),
        },
        Err(reason) => {
            tracing::warn!(reason, "refused a request");
            Response::Refused { reason }
        }
    }
}

/// An error with its causes.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Counts an open connection; uncounts it on drop.
struct OpenGuard(Arc<AtomicUsize>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One per attached volume, and room for administrators.
const CONNECTIONS_MAX: usize = 64;
/// For the handshake; the client is on this host.
const TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use bascule_types::VolumeId;
    use bascule_volume_gate::LinuxClock;
    use bascule_volume_protocol::Rules;

    use super::*;
    use crate::enlisted_volumes::EnlistedVolumes;
    use crate::enlistment_store::EnlistmentFile;
    use crate::watchdog_device::NoDevice;

    /// Regression: the loop could exit on its own timer before the answer was sent, and a volume
    /// enlisted in between lost its watchdog.
    #[test]
    fn i1_after_disarm_is_granted_no_volume_is_enlisted_and_the_exit_waits_for_the_answer() {
        let dir = tempfile::tempdir().unwrap();
        let store = EnlistmentFile::new(dir.path().join("watchdog.json")).unwrap();
        let volumes = EnlistedVolumes::load(Box::new(store), Rules::ENFORCED).unwrap();
        let shared = Shared::new(Some(&NoDevice), volumes, Arc::new(LinuxClock));
        let granted = answer(Request::Disarm, &shared);
        assert!(matches!(granted, Response::Status { .. }), "{granted:?}");
        assert!(!shared.lock().ending);
        let enlist = Request::Enlist {
            volume: VolumeId::from_bytes([1; 16]),
            gate_page: dir.path().join("gate"),
            lease_until: None,
            decided_at: None,
        };
        let Response::Refused { reason } = answer(enlist, &shared) else {
            panic!("enlisted");
        };
        assert!(reason.contains("exits"), "{reason}");
    }

    /// Regression: the client whose request withdrew the last volume while the host shuts down lost its answer.
    #[test]
    fn a_host_that_shuts_down_waits_for_the_answer_to_the_last_withdrawal() {
        let dir = tempfile::tempdir().unwrap();
        let store = EnlistmentFile::new(dir.path().join("watchdog.json")).unwrap();
        let volumes = EnlistedVolumes::load(Box::new(store), Rules::ENFORCED).unwrap();
        let shared = Shared::new(Some(&NoDevice), volumes, Arc::new(LinuxClock));
        shared.terminate();
        let answering = shared.begin_answer();
        assert!(shared.decide().is_some(), "it ends before the answer");
        drop(answering);
        assert!(shared.decide().is_none());
    }
}
