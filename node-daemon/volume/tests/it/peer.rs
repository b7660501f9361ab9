//! Only nodes with a certificate of the cluster's authority may send requests to a coordinator.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use bascule_ipc::mutual_tls::MutualTlsError;
use bascule_pki::{Authority, Identity};
use bascule_types::{NodeUid, VolumeId};
use bascule_volume::peer_rpc::{PeerError, PeerOperation, PeerRequest, PeerResponse, Tls};

const TIMEOUT: Duration = Duration::from_secs(20);

fn identity(authority: &Authority, identity: &Identity) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let put = |file: &str, text: &str| std::fs::write(dir.path().join(file), text).unwrap();
    put("node.crt", &identity.certificate_pem);
    put("node.key", &identity.key_pem);
    put("ca.crt", authority.certificate_pem());
    dir
}

fn request() -> PeerRequest {
    PeerRequest {
        volume: VolumeId::from_bytes([1; 16]),
        node: NodeUid::from_bytes([2; 16]),
        owner: None,
        boot: [3; 16],
        operation: PeerOperation::Rows,
    }
}

/// The results of the client and of the server, which answers every request that it accepts.
fn connect(
    client: &Path,
    server: &Path,
) -> (Result<PeerResponse, PeerError>, Result<(), PeerError>) {
    connect_at("127.0.0.1:0", client, server)
}

fn connect_at(
    listen: &str,
    client: &Path,
    server: &Path,
) -> (Result<PeerResponse, PeerError>, Result<(), PeerError>) {
    let listener = TcpListener::bind(listen).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let (stream, _) = listener.accept().unwrap();
            let answer = |received| {
                assert_eq!(received, request());
                PeerResponse::NotCoordinator
            };
            Tls::new(server).serve(stream, TIMEOUT, answer)
        });
        let answered = Tls::new(client).request(address, &request(), TIMEOUT);
        (answered, served.join().unwrap())
    })
}

#[test]
fn two_nodes_of_one_authority_exchange_a_request() {
    let (authority, _) = Authority::create("test").unwrap();
    let node = |n| authority.issue_node(NodeUid::from_bytes([n; 16])).unwrap();
    let (one, two) = (
        identity(&authority, &node(1)),
        identity(&authority, &node(2)),
    );
    // A certificate says which node its holder is, not where it is: it is as good for any address.
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let (answered, served) = connect_at(listen, one.path(), two.path());
        assert_eq!(answered.unwrap(), PeerResponse::NotCoordinator);
        served.unwrap();
    }
}

#[test]
fn certificates_of_operators_and_of_other_authorities_are_refused() {
    let (authority, _) = Authority::create("test").unwrap();
    let (foreign, _) = Authority::create("other").unwrap();
    let issued = authority.issue_node(NodeUid::from_bytes([1; 16])).unwrap();
    let node = identity(&authority, &issued);
    let operator = authority.issue_operator(&["operator".to_owned()]).unwrap();
    let operator = identity(&authority, &operator);
    let (answered, served) = connect(operator.path(), node.path());
    assert!(matches!(served, Err(PeerError::NotANode)), "{served:?}");
    answered.unwrap_err();
    let issued = foreign.issue_node(NodeUid::from_bytes([2; 16])).unwrap();
    let other = identity(&foreign, &issued);
    let (answered, served) = connect(other.path(), node.path());
    answered.unwrap_err();
    served.unwrap_err();
}

#[test]
fn a_client_that_sends_nothing_times_out() {
    let (authority, _) = Authority::create("test").unwrap();
    let issued = authority.issue_node(NodeUid::from_bytes([1; 16])).unwrap();
    let node = identity(&authority, &issued);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let idle = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let short = Duration::from_millis(100);
    let served = Tls::new(node.path()).serve(stream, short, |_| PeerResponse::NotCoordinator);
    assert!(matches!(served, Err(PeerError::Io(_))), "{served:?}");
    drop(idle);
}

/// A renewal can replace only one file atomically, so the single file wins over three files.
#[test]
fn an_identity_in_one_file_is_preferred_to_three_files_that_do_not_match() {
    let (authority, _) = Authority::create("test").unwrap();
    let node = |n| authority.issue_node(NodeUid::from_bytes([n; 16])).unwrap();
    let (one, two) = (
        identity(&authority, &node(1)),
        identity(&authority, &node(2)),
    );
    std::fs::write(one.path().join("node.key"), node(1).key_pem).unwrap();
    let unused = "127.0.0.1:1".parse().unwrap();
    let answered = Tls::new(one.path()).request(unused, &request(), TIMEOUT);
    assert!(
        matches!(
            answered,
            Err(PeerError::Identity(MutualTlsError::Config(_)))
        ),
        "{answered:?}"
    );
    let whole = node(1);
    let bundle = bascule_ipc::tls::TlsIdentity {
        key: whole.key_pem,
        certificate: whole.certificate_pem,
        authorities: authority.certificate_pem().to_owned(),
    };
    std::fs::write(one.path().join("node.pem"), bundle.to_bundle()).unwrap();
    for (client, server) in [(&one, &two), (&two, &one)] {
        let (answered, served) = connect(client.path(), server.path());
        assert_eq!(answered.unwrap(), PeerResponse::NotCoordinator);
        served.unwrap();
    }
}
