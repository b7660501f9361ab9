//! The console as a WebSocket, in the frames of Kubernetes' `v5.channel.k8s.io`, which its clients have code for: binary
//! messages whose first byte is a channel.
//!
//! | channel | from | what follows |
//! |---|---|---|
//! | 0 | client | what is typed |
//! | 1 | server | the guest's output |
//! | 5 | server | first of all: the position of the first byte of output, 8 bytes, big-endian |
//! | others | client | ignored, as the size of a terminal is: a serial port has none |
//!
//! Either side may close at any time; the server does when the guest is off or has left its node, and when the client does
//! not keep up. A client that comes back names the position that it has reached, and misses nothing of the last 256 KiB.

use std::future::Future;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, Response as HttpResponse, StatusCode, header};
use axum::response::Response;
use bascule_node_api::proto::{ConsoleInput, ConsoleOutput};
use futures::{SinkExt, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::status::Failure;
use crate::node_clients::NodeConsole;

/// A WebSocket, from the server's side.
pub(super) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// A request that can become a WebSocket.
#[derive(Debug)]
pub(super) struct Upgrade {
    accept: String,
    on_upgrade: OnUpgrade,
}

impl Upgrade {
    /// RFC 6455, 4.2.1.
    pub(super) fn of(mut request: Request) -> Result<Self, Failure> {
        let headers = request.headers();
        let wanted = has_token(headers, &header::CONNECTION, "upgrade")
            && has_token(headers, &header::UPGRADE, "websocket")
            && has_token(headers, &header::SEC_WEBSOCKET_VERSION, "13");
        let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| wanted);
        let key = key.ok_or_else(|| {
            let message = "the console is a WebSocket: use `kubectl bascule console`";
            Failure::new(StatusCode::UPGRADE_REQUIRED, "BadRequest", message)
        })?;
        if !has_token(headers, &header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL) {
            let message = format!("the console needs the WebSocket subprotocol {PROTOCOL}");
            return Err(Failure::bad_request(message));
        }
        let accept = derive_accept_key(key.as_bytes());
        let on_upgrade = hyper::upgrade::on(&mut request);
        Ok(Self { accept, on_upgrade })
    }

    /// The response that makes the request a WebSocket, with which `serve` goes on.
    pub(super) fn accept<F>(self, serve: impl FnOnce(Socket) -> F + Send + 'static) -> Response
    where
        F: Future<Output = ()> + Send,
    {
        tokio::spawn(async move {
            let upgraded = match self.on_upgrade.await {
                Ok(upgraded) => TokioIo::new(upgraded),
                Err(error) => {
                    tracing::debug!(%error, "no WebSocket");
                    return;
                }
            };
            let limits = WebSocketConfig::default()
                .max_message_size(Some(INPUT_BYTES_MAX))
                .max_frame_size(Some(INPUT_BYTES_MAX));
            let socket =
                WebSocketStream::from_raw_socket(upgraded, Role::Server, Some(limits)).await;
            serve(socket).await;
        });
        let mut response = HttpResponse::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        let mut set = |name, value: &str| {
            if let Ok(value) = value.parse() {
                headers.insert(name, value);
            }
        };
        set(header::CONNECTION, "Upgrade");
        set(header::UPGRADE, "websocket");
        set(header::SEC_WEBSOCKET_ACCEPT, &self.accept);
        set(header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL);
        response
    }
}

/// Whether a header's list has this token.
fn has_token(headers: &HeaderMap, name: &header::HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter();
    let mut tokens = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|v| v.split(','));
    tokens.any(|one| one.trim().eq_ignore_ascii_case(token))
}

/// Passes on what is typed and what the guest prints until either side ends.
pub(super) async fn relay(mut socket: Socket, mut console: NodeConsole) {
    let mut pings = interval(PING_INTERVAL);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut unanswered = 0;
    loop {
        let sent = tokio::select! {
            output = console.output.message() => match output {
                Ok(Some(output)) => send(&mut socket, to_client(output)).await,
                _ => break,
            },
            received = socket.next() => {
                unanswered = 0;
                match received {
                    Some(Ok(Message::Binary(message))) => match typed(&message) {
                        Some(data) => type_in(&console, data).await,
                        None => Ok(()),
                    },
                    Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                    // Pings are answered by the library.
                    Some(Ok(_)) => Ok(()),
                }
            }
            _ = pings.tick() => {
                unanswered += 1;
                if unanswered > UNANSWERED_MAX {
                    break;
                }
                send(&mut socket, Message::Ping(Vec::new().into())).await
            }
        };
        if sent.is_err() {
            break;
        }
    }
    // The client may be gone.
    drop(timeout(CLOSE_LIMIT, socket.close(None)).await);
}

/// The stream of one side is unusable.
struct Broken;

async fn send(socket: &mut Socket, message: Message) -> Result<(), Broken> {
    match timeout(SEND_LIMIT, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(WsError::WriteBufferFull(_) | WsError::ConnectionClosed | _)) | Err(_) => {
            Err(Broken)
        }
    }
}

async fn type_in(console: &NodeConsole, data: &[u8]) -> Result<(), Broken> {
    let input = ConsoleInput {
        data: data.to_vec(),
        ..ConsoleInput::default()
    };
    let sent = timeout(SEND_LIMIT, console.input_tx.send(input)).await;
    sent.ok().and_then(Result::ok).ok_or(Broken)
}

fn to_client(output: ConsoleOutput) -> Message {
    let mut message = Vec::with_capacity(output.data.len() + 1);
    if output.data.is_empty() {
        message.push(POSITION);
        message.extend(output.position.to_be_bytes());
    } else {
        message.push(OUTPUT);
        message.extend(output.data);
    }
    Message::Binary(message.into())
}

/// What a message of the client types.
fn typed(message: &[u8]) -> Option<&[u8]> {
    match message {
        [INPUT, data @ ..] if !data.is_empty() => Some(data),
        _ => None,
    }
}

const PROTOCOL: &str = "v5.channel.k8s.io";
const INPUT: u8 = 0;
const OUTPUT: u8 = 1;
const POSITION: u8 = 5;
/// What is pasted at once; a serial port takes 64 KiB.
const INPUT_BYTES_MAX: usize = 64 << 10;
/// Load balancers close connections that are idle for a minute.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// A client that has answered none of so many pings is gone.
const UNANSWERED_MAX: u32 = 3;
/// A client that does not read holds its console that long at most.
const SEND_LIMIT: Duration = Duration::from_secs(60);
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_told_apart() {
        let output = |position, data: &[u8]| {
            let data = data.to_vec();
            to_client(ConsoleOutput { position, data })
                .into_data()
                .to_vec()
        };
        assert_eq!(output(258, b""), [5, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(output(258, b"ok"), [1, b'o', b'k']);
        assert_eq!(typed(b"\0ls\r"), Some(&b"ls\r"[..]));
        for ignored in [&b""[..], b"\0", b"\x04{\"Width\":80}", b"\xFF\0"] {
            assert_eq!(typed(ignored), None);
        }
    }

    #[test]
    fn only_a_websocket_of_kubernetes_protocol_is_opened() {
        let request = |headers: &[(&str, &str)]| {
            let mut request = Request::new(Body::empty());
            for (name, value) in headers {
                let name: header::HeaderName = name.parse().unwrap();
                request.headers_mut().append(name, value.parse().unwrap());
            }
            Upgrade::of(request)
        };
        let whole = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            (
                "sec-websocket-protocol",
                "v5.channel.k8s.io, v4.channel.k8s.io",
            ),
        ];
        // The example of RFC 6455, 1.3.
        let upgrade = request(&whole).unwrap();
        assert_eq!(upgrade.accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        for left_out in 0..whole.len() {
            let mut headers = whole.to_vec();
            let (name, _) = headers.remove(left_out);
            assert!(request(&headers).is_err(), "without {name}");
        }
    }
}
