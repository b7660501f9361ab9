//! Frames between the processes of a node.

use std::fmt::Debug;
use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bascule_ipc::{Connection, Hello, vm, volume, watchdog};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The first byte selects the awaited message, the second says how much longer the frame claims to be. A hello
/// of this release comes first, unless the third byte says otherwise.
pub(crate) fn frame(data: &[u8]) {
    let Some(([awaited, longer_by, greets], body)) = data.split_first_chunk() else {
        return;
    };
    // What is sent fits into the socket's buffer, so that one thread can be both ends.
    if body.len() > BODY_BYTES_MAX {
        return;
    }
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    if greets % 8 != 7 {
        let hello = serde_json::to_vec(&Hello::THIS).unwrap();
        write(&mut theirs, &hello, 0);
    }
    write(&mut theirs, body, *longer_by);
    theirs.shutdown(Shutdown::Write).unwrap();
    let Ok(connection) = Connection::open(ours, TIMEOUT) else {
        return;
    };
    match awaited % 8 {
        0 => receive::<vm::Request>(connection),
        1 => receive::<vm::Response>(connection),
        2 => receive::<volume::Request>(connection),
        3 => receive::<volume::Response>(connection),
        4 => receive::<watchdog::Request>(connection),
        5 => receive::<watchdog::Response>(connection),
        6 => receive::<watchdog::HolderRequest>(connection),
        _ => receive::<watchdog::HolderResponse>(connection),
    }
}

fn write(to: &mut UnixStream, body: &[u8], longer_by: u8) {
    let length = u32::try_from(body.len()).unwrap() + u32::from(longer_by);
    to.write_all(&length.to_le_bytes()).unwrap();
    to.write_all(body).unwrap();
}

/// A message that is accepted reads back as itself.
fn receive<T: Serialize + DeserializeOwned + PartialEq + Debug>(mut connection: Connection) {
    while let Ok((message, descriptors)) = connection.recv::<T>() {
        assert!(descriptors.is_empty());
        reads_back(&message);
    }
}

/// What was read from JSON is written to JSON that reads back as it.
pub(crate) fn reads_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(message: &T) {
    let text = serde_json::to_string(message).unwrap();
    let again: T = serde_json::from_str(&text).unwrap();
    assert_eq!(&again, message);
}

/// Below the default buffer of a unix socket (net.core.wmem_default, 208 KiB).
const BODY_BYTES_MAX: usize = 16 << 10;
/// Never reached: everything is sent before the first read.
const TIMEOUT: Duration = Duration::from_secs(5);
