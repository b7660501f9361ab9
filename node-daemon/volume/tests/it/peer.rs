//! Who may ask a coordinator: nodes of the same authority, and nobody else.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use bascule_ipc::mutual_tls::MutualTlsError;
use bascule_pki::{Authority, Identity};
use bascule_types::{NodeUid, VolumeId};
use bascule_volume::peer_rpc::{PeerError, PeerOperation, PeerRequest, PeerResponse, Tls};

const PATIENCE: Duration = Duration::from_secs(20);

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

/// What client and server make of each other. The server answers every request that it accepts.
fn meet(client: &Path, server: &Path) -> (Result<PeerResponse, PeerError>, Result<(), PeerError>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let (stream, _) = listener.accept().unwrap();
            let answer = |asked| {
                assert_eq!(asked, request());
                PeerResponse::NotCoordinator
            };
            Tls::new(server).serve(stream, PATIENCE, answer)
        });
        let asked = Tls::new(client).request(address, &request(), PATIENCE);
        (asked, served.join().unwrap())
    })
}

#[test]
fn nodes_of_one_authority_understand_each_other() {
    let (authority, _) = Authority::create("test").unwrap();
    let node = |n| authority.issue_node(NodeUid::from_bytes([n; 16])).unwrap();
    let (one, two) = (
        identity(&authority, &node(1)),
        identity(&authority, &node(2)),
    );
    let (asked, served) = meet(one.path(), two.path());
    assert_eq!(asked.unwrap(), PeerResponse::NotCoordinator);
    served.unwrap();
}

#[test]
fn an_operators_certificate_and_a_foreign_authoritys_are_refused() {
    let (authority, _) = Authority::create("test").unwrap();
    let (foreign, _) = Authority::create("other").unwrap();
    let issued = authority.issue_node(NodeUid::from_bytes([1; 16])).unwrap();
    let node = identity(&authority, &issued);
    let operator = authority.issue_operator(&["operator".to_owned()]).unwrap();
    let operator = identity(&authority, &operator);
    let (asked, served) = meet(operator.path(), node.path());
    assert!(matches!(served, Err(PeerError::NotANode)), "{served:?}");
    asked.unwrap_err();
    let issued = foreign.issue_node(NodeUid::from_bytes([2; 16])).unwrap();
    let stranger = identity(&foreign, &issued);
    let (asked, served) = meet(stranger.path(), node.path());
    asked.unwrap_err();
    served.unwrap_err();
}

#[test]
fn a_peer_that_says_nothing_is_given_up() {
    let (authority, _) = Authority::create("test").unwrap();
    let issued = authority.issue_node(NodeUid::from_bytes([1; 16])).unwrap();
    let node = identity(&authority, &issued);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let short = Duration::from_millis(100);
    let served = Tls::new(node.path()).serve(stream, short, |_| PeerResponse::NotCoordinator);
    assert!(matches!(served, Err(PeerError::Io(_))), "{served:?}");
    drop(silent);
}

/// The certificate is renewed while others read it: only one file can be replaced at once.
#[test]
fn an_identity_in_one_file_serves_and_goes_before_three_that_do_not_fit() {
    let (authority, _) = Authority::create("test").unwrap();
    let node = |n| authority.issue_node(NodeUid::from_bytes([n; 16])).unwrap();
    let (one, two) = (
        identity(&authority, &node(1)),
        identity(&authority, &node(2)),
    );
    std::fs::write(one.path().join("node.key"), node(1).key_pem).unwrap();
    let nobody = "127.0.0.1:1".parse().unwrap();
    let asked = Tls::new(one.path()).request(nobody, &request(), PATIENCE);
    assert!(
        matches!(asked, Err(PeerError::Identity(MutualTlsError::Config(_)))),
        "{asked:?}"
    );
    let whole = node(1);
    let bundle = bascule_ipc::tls::TlsIdentity {
        key: whole.key_pem,
        certificate: whole.certificate_pem,
        authorities: authority.certificate_pem().to_owned(),
    };
    std::fs::write(one.path().join("node.pem"), bundle.to_bundle()).unwrap();
    for (client, server) in [(&one, &two), (&two, &one)] {
        let (asked, served) = meet(client.path(), server.path());
        assert_eq!(asked.unwrap(), PeerResponse::NotCoordinator);
        served.unwrap();
    }
}
