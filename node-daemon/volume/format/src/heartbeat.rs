//! Heartbeat slots: one per node. Only that node writes its slot; every node reads all of them.
//!
//! A slot has [`HEARTBEAT_RECORDS`] blocks, written in turn: the record with sequence number `n`
//! goes to block `n mod 4`, so that a torn or late write does not destroy the newest record. The
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
//!    120    8  features that the node supports (see `features`)
//!    128   65  address of the node's metadata service: length, 64 bytes
//! ```

use bascule_types::{Generation, NodeUid, Owner, SlotId};

use crate::envelope::{BodyReader, BodyWriter, FormatError, Kind, Record};
use crate::features::Features;
use crate::timing::Timings;

/// Blocks per heartbeat slot.
pub const HEARTBEAT_RECORDS: u64 = 4;
/// The longest service address in bytes: an IPv6 address with scope and port fits.
pub const ADDRESS_BYTES_MAX: usize = 64;

/// A heartbeat: the renewal of its writer's lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeartbeatRecord {
    /// The node that wrote the record.
    pub node: NodeUid,
    /// The kernel's boot id, `/proc/sys/kernel/random/boot_id`.
    pub boot: [u8; 16],
    /// The slot and its generation.
    pub owner: Owner,
    /// Rises with every renewal, from 1; each number is sent once (R3).
    pub sequence: u64,
    /// What resets the node when it cannot renew its lease.
    pub watchdog: WatchdogKind,
    /// Whether the node has left: every gate is closed and every submitted write has completed.
    pub detached: bool,
    /// The times by which this node's lease and watchdog work.
    pub timings: Timings,
    /// The features that the node's release knows.
    pub features: Features,
    /// `host:port` at which the node's `bascule-volume` takes changes; empty if it takes none.
    pub address: String,
}

/// What resets a node that cannot renew its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WatchdogKind {
    /// Nothing.
    None,
    /// The kernel's softdog. It hangs with the kernel, so it counts only if the policy allows it.
    Software,
    /// A device that resets the node also when its kernel hangs.
    Hardware,
}

impl HeartbeatRecord {
    /// The index of this record's block in the slot, 0 to 3.
    #[must_use]
    pub const fn block_of_slot(&self) -> u64 {
        self.sequence % HEARTBEAT_RECORDS
    }

    /// Orders the records of a slot.
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
        body.u64(self.features.bits());
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
        let features = Features::from_bits(body.u64());
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
            features,
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
