//! A VM's serial console, between its process and the operator.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bascule_node_api::command::RejectReason;
use bascule_node_api::proto::{ConsoleInput, ConsoleOutput};
use bascule_types::VmUid;
use futures::Stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::version::agreed_version;
use crate::processes::supervisor::{Rejection, Supervisor};

/// What a console sends to the operator.
pub(super) type Output = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

/// Attaches to the console that the first message names, and passes bytes on until either side ends.
pub(super) async fn open(
    supervisor: Arc<Supervisor>,
    mut input: Streaming<ConsoleInput>,
) -> Result<Output, Status> {
    let first = tokio::time::timeout(FIRST_LIMIT, input.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no VM was named"))??;
    let first = first.ok_or_else(|| Status::invalid_argument("no VM was named"))?;
    agreed_version(first.version, first.version_min)?;
    let vm: VmUid = first
        .vm
        .parse()
        .map_err(|_| Status::invalid_argument("the VM is not named by its UID"))?;
    let attached =
        tokio::task::spawn_blocking(move || supervisor.attach_console(vm, first.from)).await;
    let attached = attached.map_err(|error| Status::internal(error.to_string()))?;
    let (position, stream) = attached.map_err(refused)?;
    let stream = async_stream(stream).map_err(|error| Status::internal(format!("{error:#}")))?;
    let (output_tx, output_rx) = mpsc::channel(QUEUE);
    tokio::spawn(relay(stream, position, input, output_tx));
    Ok(Box::pin(ReceiverStream::new(output_rx)))
}

fn async_stream(stream: StdUnixStream) -> Result<UnixStream> {
    stream.set_nonblocking(true).context("set up a socket")?;
    UnixStream::from_std(stream).context("set up a socket")
}

async fn relay(
    stream: UnixStream,
    position: u64,
    input: Streaming<ConsoleInput>,
    output_tx: mpsc::Sender<Result<ConsoleOutput, Status>>,
) {
    let (from_guest, to_guest) = stream.into_split();
    let gone = output_tx.clone();
    tokio::select! {
        () = show(from_guest, position, output_tx) => {}
        () = type_in(to_guest, input) => {}
        () = gone.closed() => {}
    }
}

/// Passes the guest's output on. Ends with the VM process's stream, or when the operator is gone.
async fn show(
    mut from_guest: OwnedReadHalf,
    mut position: u64,
    output_tx: mpsc::Sender<Result<ConsoleOutput, Status>>,
) {
    let mut data = Vec::new();
    loop {
        let length = data.len();
        let next = ConsoleOutput { position, data };
        if output_tx.send(Ok(next)).await.is_err() {
            return;
        }
        position = position.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
        data = Vec::with_capacity(OUTPUT_BYTES_MAX);
        // Reads as many bytes as there is room for.
        match from_guest.read_buf(&mut data).await {
            Ok(1..) => {}
            _ => return,
        }
    }
}

/// Passes on what is typed. Ends when the operator's stream fails; one that is just ended types no more.
async fn type_in(mut to_guest: OwnedWriteHalf, mut input: Streaming<ConsoleInput>) {
    loop {
        match input.message().await {
            Ok(Some(typed)) => {
                if to_guest.write_all(&typed.data).await.is_err() {
                    return;
                }
            }
            Ok(None) => std::future::pending().await,
            Err(_) => return,
        }
    }
}

fn refused(Rejection { reason, message }: Rejection) -> Status {
    match reason {
        RejectReason::VmNotHere => Status::not_found(message),
        _ => Status::failed_precondition(message),
    }
}

/// The client names the VM with its call.
const FIRST_LIMIT: Duration = Duration::from_secs(5);
/// Messages that wait for the network. What does not fit stays in the VM process's queue, which is bounded.
const QUEUE: usize = 4;
const OUTPUT_BYTES_MAX: usize = 16 << 10;
