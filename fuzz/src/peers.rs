//! Frames between the volume processes of two nodes.

use std::fmt::Debug;

use bascule_volume::peer_rpc::{PeerError, frames};
use serde::Serialize;

/// The first byte selects the awaited message, and whether the second says how much longer the frame claims to be or its
/// length is as it comes.
pub(crate) fn frame(data: &[u8]) {
    let Some(([kind, longer_by], body)) = data.split_first_chunk() else {
        return;
    };
    let frame = if kind & 0x80 == 0 {
        let length = u32::try_from(body.len()).unwrap() + u32::from(*longer_by);
        [&length.to_le_bytes(), body].concat()
    } else {
        body.to_vec()
    };
    match kind % 4 {
        0 => {
            let mut from = frame.as_slice();
            if let Ok(agreed) = frames::hello(&mut from) {
                assert!(agreed > 0 && frame.len() - from.len() <= HELLO_BYTES_MAX);
            }
        }
        1 => reads_back(&frame, |from| frames::response(from)),
        _ => reads_back(&frame, |from| frames::request(from)),
    }
}

/// A message that is accepted ends where its frame says, and is written as a frame that reads back as it.
fn reads_back<T: Serialize + PartialEq + Debug>(
    frame: &[u8],
    read: impl Fn(&mut &[u8]) -> Result<T, PeerError>,
) {
    let mut from = frame;
    let Ok(message) = read(&mut from) else {
        return;
    };
    let claimed = u32::from_le_bytes(*frame.first_chunk().unwrap());
    assert_eq!(frame.len() - from.len(), 4 + claimed as usize);
    let mut written = vec![];
    frames::write(&message, &mut written).unwrap();
    let mut rest = written.as_slice();
    assert_eq!(read(&mut rest).unwrap(), message);
    assert!(rest.is_empty());
}

/// A hello's frame with its length.
const HELLO_BYTES_MAX: usize = 4 + (1 << 10);
