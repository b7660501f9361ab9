//! Calls over this node's local sockets.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use bascule_ipc::{Connection, IpcError, vm, volume};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Calls a `bascule-vm`.
pub(crate) fn vm_call(socket: &Path, request: &vm::Request) -> Result<vm::Response, IpcError> {
    call(socket, request, ANSWER_TIMEOUT)
}

/// Attaches to the serial console of a `bascule-vm`, and returns the position of the stream's first byte.
pub(crate) fn console_call(
    socket: &Path,
    from: Option<u64>,
) -> Result<(vm::Response, Option<OwnedFd>), IpcError> {
    let mut connection = Connection::connect(socket, HELLO_TIMEOUT)?;
    connection.require(CONSOLE_VERSION)?;
    connection.set_timeout(Some(ANSWER_TIMEOUT))?;
    let (response, fds) = connection.call(&vm::Request::ConsoleFrom { from })?;
    Ok((response, fds.into_iter().next()))
}

/// Calls a `bascule-volume`, with the longer [`COORDINATOR_TIMEOUT`]: it may have to find a
/// coordinator first.
pub(crate) fn volume_call(
    socket: &Path,
    request: &volume::Request,
) -> Result<volume::Response, IpcError> {
    call(socket, request, COORDINATOR_TIMEOUT)
}

/// Sends one request on a connection of its own, so that a peer that hangs blocks one thread and no
/// other request.
fn call<Q: Serialize, A: DeserializeOwned>(
    socket: &Path,
    request: &Q,
    timeout: Duration,
) -> Result<A, IpcError> {
    let mut connection = Connection::connect(socket, HELLO_TIMEOUT)?;
    connection.set_timeout(Some(timeout))?;
    connection.call(request).map(|(answer, _)| answer)
}

/// The first version with [`vm::Request::ConsoleFrom`].
const CONSOLE_VERSION: u32 = 5;
/// Local processes answer a hello within milliseconds unless they hang.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// A `bascule-vm` answers within milliseconds, except for requests that drain a device.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than `bascule-volume`'s own limit for finding a coordinator, so that its answer arrives.
const COORDINATOR_TIMEOUT: Duration = Duration::from_secs(45);
