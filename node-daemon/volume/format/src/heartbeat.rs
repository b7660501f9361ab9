//! Heartbeat slots: one per node, written by that node alone.
//!
//! A slot has [`HEARTBEAT_RECORDS`] blocks, written in turn: the record of sequence number `n`
//! lies in block `n mod 4`, so that a torn or late write never destroys the newest record. The
//! newest record of a slot is the one with the highest (generation, sequence).
//!
//! ```text
//! offset size  field                              (header epoch: the generation)
//!     48   16  node uid
//!     64   16  boot id: the kernel's random one, different after every boot
//!     80    8  sequence, from 1, rises within a generation
//!     88    2  slot
//!     90    1  watchdog kind: 0 none, 1 software, 2 hardware
//!     91    1  flags: 1 = detached (every gate closed, every submitted write completed)
//!     92    4  zero
//!     96   24  timings
//!    120   65  address of the node's metadata service: length, 64 bytes
//! ```

use bascule_types::{Generation, NodeUid, Owner, SlotId};

use crate::FormatError;
use crate::envelope::{BodyReader, BodyWriter, Kind, Record};
use crate::timing::Timings;

/// Blocks per heartbeat slot.
pub const HEARTBEAT_RECORDS: u64 = 4;
/// The longest service address: an IPv6 address with scope and port fits.
pub const ADDRESS_BYTES_MAX: usize = 64;

/// One sign of life.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeartbeatRecord {
    /// Who.
    pub node: NodeUid,
    /// The kernel's boot id, `/proc/sys/kernel/random/boot_id`.
    pub boot: [u8; 16],
    /// The slot and its generation.
    pub owner: Owner,
    /// Rises with every renewal of a generation, from 1; each number is sent once (R3).
    pub sequence: u64,
    /// What resets the node when it cannot renew.
    pub watchdog: WatchdogKind,
    /// The node left: every gate closed and every submitted write completed.
    pub detached: bool,
    /// The times that this node obeys.
    pub timings: Timings,
    /// Where its `bascule-volume` takes changes, `host:port`; empty if nowhere.
    pub address: String,
}

/// What resets a node that cannot renew its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WatchdogKind {
    /// Nothing.
    None,
    /// The kernel's softdog: it hangs with the kernel, so it proves nothing unless allowed.
    Software,
    /// A device that counts on when the kernel does not.
    Hardware,
}

impl HeartbeatRecord {
    /// Which of the slot's blocks this record lies in.
    #[must_use]
    pub const fn block_of_slot(&self) -> u64 {
        self.sequence % HEARTBEAT_RECORDS
    }

    /// What orders the records of a slot.
    #[must_use]
    pub const fn order(&self) -> (Generation, u64) {
        (self.owner.generation, self.sequence)
    }
}

impl Record for HeartbeatRecord {
    const KIND: Kind = Kind::Heartbeat;

    fn epoch(&self) -> u64 {
        self.owner.generation.0
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.bytes(&self.node.to_bytes());
        body.bytes(&self.boot);
        body.u64(self.sequence);
        body.u16(self.owner.slot.0);
        body.u8(self.watchdog.code());
        body.u8(u8::from(self.detached));
        body.u32(0);
        self.timings.encode(body);
        body.text(&self.address, ADDRESS_BYTES_MAX);
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        let node = NodeUid::from_bytes(body.array());
        let boot = body.array();
        let sequence = body.u64();
        let slot = SlotId(body.u16());
        let watchdog = WatchdogKind::from_code(body.u8())?;
        let detached = body.flag("detached")?;
        body.u32();
        let timings = Timings::parse(body)?;
        let address = body.text::<ADDRESS_BYTES_MAX>("address")?;
        if sequence == 0 {
            return Err(FormatError::Field("sequence"));
        }
        Ok(Self {
            node,
            boot,
            owner: Owner {
                slot,
                generation: Generation(epoch),
            },
            sequence,
            watchdog,
            detached,
            timings,
            address,
        })
    }
}

impl WatchdogKind {
    const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Software => 1,
            Self::Hardware => 2,
        }
    }

    const fn from_code(code: u8) -> Result<Self, FormatError> {
        match code {
            0 => Ok(Self::None),
            1 => Ok(Self::Software),
            2 => Ok(Self::Hardware),
            _ => Err(FormatError::Field("watchdog")),
        }
    }
}
