//! Listening for both address families with one socket.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Listens on `address`. `[::]` stands for all addresses of both families: IPv4 clients are accepted
/// too, whatever `net.ipv6.bindv6only` says, and on a host without IPv6 it is `0.0.0.0`.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match bind(address) {
        Err(error) if has_no_ipv6(&error) && is_any_ipv6(address) => bind(SocketAddr::new(
            Ipv4Addr::UNSPECIFIED.into(),
            address.port(),
        )),
        done => done,
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if is_any_ipv6(address) {
        socket.set_only_v6(false)?;
    }
    // As std does: a restarted operator need not wait for connections that are being closed.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn is_any_ipv6(address: SocketAddr) -> bool {
    matches!(address.ip(), IpAddr::V6(ip) if ip.is_unspecified())
}

/// Booted with ipv6.disable=1 the kernel knows no such socket, or no such address.
fn has_no_ipv6(error: &io::Error) -> bool {
    error.raw_os_error() == Some(EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

/// `errno.h` of Linux.
const EAFNOSUPPORT: i32 = 97;
/// Connections that wait to be accepted: all nodes of a large cluster may enrol at once.
const BACKLOG: i32 = 1024;

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpStream};

    use super::*;

    /// On an IPv6-only cluster nothing was reached: the operator listened on 0.0.0.0.
    #[tokio::test]
    async fn one_listener_takes_clients_of_both_families() {
        let listener = listen("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        for client in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            let client = TcpStream::connect(SocketAddr::new(client, port)).unwrap();
            let (_, from) = listener.accept().await.unwrap();
            assert_eq!(from.port(), client.local_addr().unwrap().port());
        }
    }

    #[tokio::test]
    async fn an_address_of_one_family_is_listened_on_alone() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let local: SocketAddr = local.parse().unwrap();
            let bound = listen(local).unwrap().local_addr().unwrap();
            assert_eq!(bound.ip(), local.ip());
        }
    }

    #[test]
    fn a_host_without_ipv6_is_told_from_a_port_in_use() {
        assert!(has_no_ipv6(&io::Error::from_raw_os_error(EAFNOSUPPORT)));
        assert!(has_no_ipv6(&io::ErrorKind::AddrNotAvailable.into()));
        assert!(!has_no_ipv6(&io::ErrorKind::AddrInUse.into()));
    }
}
