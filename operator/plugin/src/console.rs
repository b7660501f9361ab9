//! `kubectl bascule console`: one connection after the other, until the user leaves.
//!
//! The frames are those of the module `subresources::websocket` of `bascule-operator`.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::{Sink, SinkExt, Stream, StreamExt};
use http::Request;
use kube::Client;
use kube::client::UpgradeConnectionError;
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use crate::position::{Continuation, Position};
use crate::target::Target;
use crate::terminal::{Terminal, Typed};

/// A WebSocket through the API server.
trait Socket: Stream<Item = Result<Message, WsError>> + Sink<Message, Error = WsError> {}
impl<S: Stream<Item = Result<Message, WsError>> + Sink<Message, Error = WsError>> Socket for S {}
type AnySocket = Box<dyn Socket + Unpin>;

/// How a connection ended.
enum Left {
    /// The user has left the console.
    Detached,
    /// The connection was lost or closed.
    Lost,
}

/// Shows the console until the user leaves it.
///
/// # Errors
/// When the first connection is refused, or a later one for good: the right or the VirtualMachine is gone.
pub(crate) async fn run(client: &Client, target: &Target) -> Result<()> {
    let position = Position::default();
    let socket = connect(client, target, position).await;
    let socket = socket.context("open the console")?;
    let terminal = Terminal::open()?;
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut hang_up = signal(SignalKind::hangup()).context("handle SIGHUP")?;
    tokio::select! {
        ended = show(client, target, socket, terminal) => ended,
        _ = terminate.recv() => Ok(()),
        _ = hang_up.recv() => Ok(()),
    }
}

async fn show(
    client: &Client,
    target: &Target,
    mut socket: AnySocket,
    mut terminal: Terminal,
) -> Result<()> {
    let mut position = Position::default();
    terminal.tell(&format!("console of {}; Ctrl-] leaves it", target.name));
    loop {
        if let Left::Detached = exchange(&mut socket, &mut terminal, &mut position).await? {
            return Ok(());
        }
        terminal.tell("the guest moves, or the connection was lost: connecting again");
        match reconnect(client, target, position, &mut terminal).await? {
            Some(next) => socket = next,
            None => return Ok(()),
        }
    }
}

/// Passes bytes on in both directions until one side ends.
async fn exchange(
    socket: &mut AnySocket,
    terminal: &mut Terminal,
    position: &mut Position,
) -> Result<Left> {
    loop {
        tokio::select! {
            received = socket.next() => match received {
                Some(Ok(Message::Binary(message))) => take(&message, terminal, position)?,
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(Left::Lost),
                // Pings are answered by the library.
                Some(Ok(_)) => {}
            },
            typed = terminal.typed() => match typed {
                Typed::Bytes(bytes) => {
                    if socket.send(input(&bytes)).await.is_err() {
                        return Ok(Left::Lost);
                    }
                }
                Typed::Detach => {
                    // The server notices a lost connection as well.
                    drop(socket.close().await);
                    return Ok(Left::Detached);
                }
            },
        }
    }
}

fn take(message: &[u8], terminal: &Terminal, position: &mut Position) -> Result<()> {
    match message {
        [OUTPUT, data @ ..] => {
            terminal.show(data)?;
            position.shown(data.len());
        }
        [POSITION, bytes @ ..] => {
            let begin = bytes.try_into().context("the server sends no position")?;
            match position.begin(u64::from_be_bytes(begin)) {
                Continuation::Whole => {}
                Continuation::Lost(count) => {
                    terminal.tell(&format!("{count} bytes of output were lost"));
                }
                Continuation::Restarted => terminal.tell("the guest was started again"),
            }
        }
        _ => {}
    }
    Ok(())
}

/// Tries until there is a connection; none when the user leaves. What is typed meanwhile is sent then.
async fn reconnect(
    client: &Client,
    target: &Target,
    position: Position,
    terminal: &mut Terminal,
) -> Result<Option<AnySocket>> {
    let mut pause = PAUSE_MIN;
    let mut held = Vec::new();
    loop {
        match connect(client, target, position).await {
            Ok(mut socket) => {
                // A connection that fails at once is noticed by its reader.
                drop(socket.send(input(&held)).await);
                return Ok(Some(socket));
            }
            Err(error) if may_pass(&error) => {}
            Err(error) => return Err(error).context("open the console again"),
        }
        let mut wait = std::pin::pin!(tokio::time::sleep(pause));
        loop {
            tokio::select! {
                () = &mut wait => break,
                typed = terminal.typed() => match typed {
                    Typed::Bytes(bytes) if held.len() < HELD_BYTES_MAX => held.extend(bytes),
                    Typed::Bytes(_) => {}
                    Typed::Detach => return Ok(None),
                },
            }
        }
        pause = pause.saturating_mul(2).min(PAUSE_MAX);
    }
}

async fn connect(
    client: &Client,
    target: &Target,
    position: Position,
) -> Result<AnySocket, kube::Error> {
    let mut path = target.path("console");
    if let Some(from) = position.wanted() {
        path = format!("{path}?from={from}");
    }
    let request = Request::get(path).body(Vec::new());
    let request = request.map_err(kube::Error::HttpError)?;
    let connection = client.connect(request).await?;
    Ok(Box::new(connection.into_stream()))
}

/// Whether another attempt may succeed: the guest moves or is started elsewhere, a server is restarted, the network is
/// interrupted.
fn may_pass(error: &kube::Error) -> bool {
    let code = match error {
        kube::Error::Api(status) => status.code,
        kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(code)) => {
            code.as_u16()
        }
        kube::Error::Auth(_) | kube::Error::HttpError(_) => return false,
        _ => return true,
    };
    code == 429 || code >= 500
}

fn input(bytes: &[u8]) -> Message {
    let mut message = Vec::with_capacity(bytes.len() + 1);
    message.push(INPUT);
    message.extend(bytes);
    Message::Binary(message.into())
}

const INPUT: u8 = 0;
const OUTPUT: u8 = 1;
const POSITION: u8 = 5;
/// What is typed while there is no connection; the server takes messages of 64 KiB.
const HELD_BYTES_MAX: usize = 16 << 10;
/// A live migration's blackout is some 10 ms.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn a_refusal_ends_the_console_and_a_guest_that_moves_does_not() {
        let answered = |code: u16| {
            let status = Status::failure("x", "y").with_code(code);
            may_pass(&kube::Error::Api(Box::new(status)))
        };
        for (code, passes) in [
            (401, false),
            (403, false),
            (404, false),
            (429, true),
            (503, true),
        ] {
            assert_eq!(answered(code), passes, "{code}");
        }
    }
}
