//! Where a service is, as an administrator writes it.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// `host:port`, with an IPv6 address in brackets: `[fd00::1]:7410`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort(String);

/// What is wrong with a text that names no service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseHostPortError {
    /// An IPv6 address whose end cannot be told from a port.
    #[error("an IPv6 address needs brackets before its port, e.g. [fd00::1]:7410")]
    Brackets,
    /// No host, or no port from 1 to 65535.
    #[error("expected HOST:PORT, e.g. node-1:7410, 10.0.0.1:7410 or [fd00::1]:7410")]
    Spelling,
}

impl FromStr for HostPort {
    type Err = ParseHostPortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with('[') {
            let address: SocketAddr = text.parse().map_err(|_| ParseHostPortError::Spelling)?;
            return Self::of(address.port(), address.to_string());
        }
        if text.parse::<Ipv6Addr>().is_ok() || text.matches(':').count() > 1 {
            return Err(ParseHostPortError::Brackets);
        }
        let (host, port) = text.split_once(':').ok_or(ParseHostPortError::Spelling)?;
        let named = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        if host.is_empty() || !host.bytes().all(named) || !digits {
            return Err(ParseHostPortError::Spelling);
        }
        let number = port.parse().map_err(|_| ParseHostPortError::Spelling)?;
        Self::of(number, text.to_owned())
    }
}

impl HostPort {
    fn of(port: u16, text: String) -> Result<Self, ParseHostPortError> {
        if port == 0 {
            return Err(ParseHostPortError::Spelling);
        }
        Ok(Self(text))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_both_families_and_names_are_read_with_their_port() {
        for text in [
            "bascule-operator.bascule-system.svc:7409",
            "10.0.0.1:7410",
            "[::1]:7410",
            "[fd00:10:96::1]:65535",
        ] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
            let url = format!("https://{text}");
            tonic::transport::Endpoint::from_shared(url).unwrap();
        }
    }

    #[test]
    fn an_ipv6_address_without_brackets_is_told_what_it_lacks() {
        for text in ["fd00::1", "fd00::1:7410", "::1:7410", "::"] {
            let refused = text.parse::<HostPort>();
            assert_eq!(refused, Err(ParseHostPortError::Brackets), "{text}");
        }
    }

    #[test]
    fn what_names_no_service_is_refused() {
        for text in [
            "",
            "host",
            ":7410",
            "host:",
            "host:0",
            "host:70000",
            "host:+1",
            "[::1]",
            "[::1]:0",
            "[::1]7410",
            "[host]:1",
            "a/b:1",
            "user@host:1",
            "ho st:1",
        ] {
            let refused = text.parse::<HostPort>();
            assert_eq!(refused, Err(ParseHostPortError::Spelling), "{text:?}");
        }
    }
}
