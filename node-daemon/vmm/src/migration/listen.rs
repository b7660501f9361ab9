//! Where a destination waits: one port out of those that a firewall leaves open.

use std::io;
use std::net::{SocketAddr, TcpListener};

use bascule_types::PortRange;

/// Why a destination cannot wait for its source.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Every port of the range has a listener already.
    #[error(
        "TCP ports {ports} of {address} are all in use: wait until other migrations to this node end, or \
         set more ports (chart value node.migrationPorts, option --migration-ports)"
    )]
    AllInUse {
        /// The ports.
        ports: PortRange,
        /// The node's address, without its port.
        address: std::net::IpAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Io {
        /// The address.
        address: SocketAddr,
        /// The error of the socket.
        #[source]
        source: io::Error,
    },
}

/// Listens on the first free one of `ports`, or on the port of `listen` if there are none. The kernel
/// gives each port to one process only, so that destinations which start at the same time take
/// different ones.
///
/// # Errors
/// [`ListenError`].
pub fn listen_in(listen: SocketAddr, ports: Option<PortRange>) -> Result<TcpListener, ListenError> {
    let bind = |address: SocketAddr| {
        TcpListener::bind(address).map_err(|source| ListenError::Io { address, source })
    };
    let Some(ports) = ports else {
        return bind(listen);
    };
    for port in ports.ports() {
        match bind(SocketAddr::new(listen.ip(), port)) {
            Err(ListenError::Io { source, .. }) if source.kind() == io::ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
    Err(ListenError::AllInUse {
        ports,
        address: listen.ip(),
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    /// Two neighbouring free ports of the loopback of this family; the listeners are closed again.
    fn two_free(local: std::net::IpAddr) -> PortRange {
        loop {
            let first = TcpListener::bind(SocketAddr::new(local, 0)).unwrap();
            let port = first.local_addr().unwrap().port();
            let Some(next) = port.checked_add(1) else {
                continue;
            };
            if TcpListener::bind(SocketAddr::new(local, next)).is_ok() {
                return PortRange::of(port, 2);
            }
        }
    }

    /// A firewall between nodes had to be open for every port: the kernel chose one.
    #[test]
    fn destinations_share_the_range_and_one_too_many_is_told_what_to_do() {
        for local in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            let ports = two_free(local);
            let listen = SocketAddr::new(local, 0);
            let one = listen_in(listen, Some(ports)).unwrap();
            let two = listen_in(listen, Some(ports)).unwrap();
            let taken = [&one, &two].map(|listener| listener.local_addr().unwrap().port());
            assert_eq!(taken.to_vec(), ports.ports().collect::<Vec<_>>());
            let error = listen_in(listen, Some(ports)).unwrap_err().to_string();
            assert!(error.contains(&ports.to_string()), "{error}");
            assert!(error.contains("node.migrationPorts"), "{error}");
            drop(one);
            listen_in(listen, Some(ports)).unwrap();
        }
    }

    #[test]
    fn an_address_of_another_host_is_named_and_no_further_port_is_tried() {
        let elsewhere = SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).into(), 0);
        let error = listen_in(elsewhere, Some(PortRange::MIGRATION)).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot listen on 192.0.2.1:49152")
        );
    }
}
