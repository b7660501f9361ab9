//! Connecting to a gRPC peer within a time limit.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Refused, unreachable, or the wrong certificate.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// The TCP or TLS handshake did not end in time.
    #[error("no connection within {0:?}")]
    TooLong(Duration),
}

/// Connects within `limit`, TLS included. `Endpoint::connect_timeout` bounds only TCP: a peer that is
/// cut off before the TLS handshake ends would block the caller without limit.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(endpoint: &Endpoint, limit: Duration) -> Result<Channel, ConnectError> {
    match tokio::time::timeout(limit, endpoint.connect()).await {
        Ok(connected) => Ok(connected?),
        Err(_) => Err(ConnectError::TooLong(limit)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tonic::transport::ClientTlsConfig;

    use super::*;

    /// A node was reset between the TCP and the TLS handshake, and the operator waited without limit,
    /// so it never connected to that node again.
    #[tokio::test]
    async fn a_peer_that_never_agrees_on_tls_is_given_up() {
        // The kernel completes the TCP handshake; no TLS handshake follows.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let endpoint = Endpoint::from_shared(format!("https://{address}"))
            .unwrap()
            .tls_config(ClientTlsConfig::new().domain_name("unreachable"))
            .unwrap();
        let limit = Duration::from_millis(100);
        let connecting = connect(&endpoint, limit);
        let outcome = tokio::time::timeout(Duration::from_secs(60), connecting).await;
        assert!(matches!(outcome, Ok(Err(ConnectError::TooLong(_)))));
    }
}
