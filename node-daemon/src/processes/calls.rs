//! Calls over this node's local sockets.

use std::path::Path;
use std::time::Duration;

use bascule_ipc::{Connection, IpcError, vm, volume};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Calls a `bascule-vm`.
pub(crate) fn vm_call(socket: &Path, request: &vm::Request) -> Result<vm::Response, IpcError> {
    call(socket, request, ANSWER_TIMEOUT)
}

/// Calls a `bascule-volume`. It may have to find a coordinator first, so it gets more time.
pub(crate) fn volume_call(
    socket: &Path,
    request: &volume::Request,
) -> Result<volume::Response, IpcError> {
    call(socket, request, COORDINATOR_TIMEOUT)
}

/// One request on a connection of its own: a stuck peer costs one thread, never the daemon.
fn call<Q: Serialize, A: DeserializeOwned>(
    socket: &Path,
    request: &Q,
    timeout: Duration,
) -> Result<A, IpcError> {
    let mut connection = Connection::connect(socket, HELLO_TIMEOUT)?;
    connection.set_timeout(Some(timeout))?;
    connection.call(request).map(|(answer, _)| answer)
}

/// A local process answers a hello at once, or is stopped.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// A `bascule-vm` answers from memory, unless its guest is busy draining a device.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// `bascule-volume` gives up looking for a coordinator before this.
const COORDINATOR_TIMEOUT: Duration = Duration::from_secs(45);
