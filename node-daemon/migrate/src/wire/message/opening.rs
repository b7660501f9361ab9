//! The frames that open a stream.

use std::time::Duration;

use bascule_types::{AttemptId, Epoch, VmUid, VolumeId};

use super::{Config, Features, Hello, Welcome, owner_of, put_nanos, put_owner};
use crate::pages::{MemoryLayout, PageIndex, PageRange, Pages, REGIONS_MAX};
use crate::wire::cursor::{Cursor, Put};
use crate::wire::error::WireError;
use crate::wire::limits::{DESCRIPTION_BYTES_MAX, INTERFACES_MAX};

/// What `Hello` starts with.
const HELLO_MAGIC: &[u8; 8] = b"BASCMIG\0";

impl Hello {
    pub(super) fn decode(mut cursor: Cursor<'_>) -> Result<Self, WireError> {
        if cursor.bytes(HELLO_MAGIC.len())? != HELLO_MAGIC {
            return Err(cursor.malformed("it does not start with BASCMIG"));
        }
        let (version_min, version_max) = (cursor.u16()?, cursor.u16()?);
        let streams = cursor.u16()?;
        cursor.reserved(2)?;
        Ok(Self {
            version_min,
            version_max,
            streams,
            offered: Features(cursor.u64()?),
            required: Features(cursor.u64()?),
            vm: VmUid::from_bytes(cursor.id()?),
            attempt: AttemptId::from_bytes(cursor.id()?),
            epoch: Epoch(cursor.u64()?),
            source: owner_of(&mut cursor)?,
            volume: VolumeId::from_bytes(cursor.id()?),
        })
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(HELLO_MAGIC);
        out.put_u16(self.version_min);
        out.put_u16(self.version_max);
        out.put_u16(self.streams);
        out.put_zeroes(2);
        out.put_u64(self.offered.0);
        out.put_u64(self.required.0);
        out.extend_from_slice(&self.vm.to_bytes());
        out.extend_from_slice(&self.attempt.to_bytes());
        out.put_u64(self.epoch.0);
        put_owner(out, self.source);
        out.extend_from_slice(&self.volume.to_bytes());
    }
}

impl Welcome {
    pub(super) fn decode(cursor: &mut Cursor<'_>) -> Result<Self, WireError> {
        let (version, streams) = (cursor.u16()?, cursor.u16()?);
        cursor.reserved(4)?;
        Ok(Self {
            version,
            streams,
            features: Features(cursor.u64()?),
            destination: owner_of(cursor)?,
            restore_estimate: Duration::from_nanos(cursor.u64()?),
        })
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.put_u16(self.version);
        out.put_u16(self.streams);
        out.put_zeroes(4);
        out.put_u64(self.features.0);
        put_owner(out, self.destination);
        put_nanos(out, self.restore_estimate);
    }
}

impl Config {
    pub(super) fn decode(cursor: &mut Cursor<'_>) -> Result<Self, WireError> {
        let (vcpus, regions) = (cursor.u16()?, usize::from(cursor.u16()?));
        let state_version = cursor.u32()?;
        let length = usize::try_from(cursor.u32()?).unwrap_or(usize::MAX);
        cursor.reserved(4)?;
        if vcpus == 0 {
            return Err(cursor.malformed("a machine has at least one vCPU"));
        }
        if regions > REGIONS_MAX || length > DESCRIPTION_BYTES_MAX {
            return Err(cursor.malformed("too many regions or too long a description"));
        }
        let mut ranges = Vec::with_capacity(REGIONS_MAX);
        for _ in 0..regions {
            let (first, pages) = (PageIndex(cursor.u64()?), Pages(cursor.u64()?));
            ranges.push(
                PageRange::new(first, pages).map_err(|_| cursor.malformed("bad memory region"))?,
            );
        }
        let layout =
            MemoryLayout::new(ranges).map_err(|_| cursor.malformed("bad memory layout"))?;
        let description = cursor.bytes(length)?.to_vec();
        let mut offered_mtus = Vec::new();
        while !cursor.rest().is_empty() {
            if offered_mtus.len() == INTERFACES_MAX {
                return Err(cursor.malformed("too many interfaces"));
            }
            offered_mtus.push(cursor.u16()?);
        }
        Ok(Self {
            vcpus,
            state_version,
            layout,
            description,
            offered_mtus,
        })
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let ranges = self.layout.ranges();
        out.put_u16(self.vcpus);
        // At most REGIONS_MAX.
        out.put_u16(u16::try_from(ranges.len()).unwrap_or(u16::MAX));
        out.put_u32(self.state_version);
        // A description beyond the bound is refused by `FrameWriter`.
        out.put_u32(u32::try_from(self.description.len()).unwrap_or(u32::MAX));
        out.put_zeroes(4);
        for range in ranges {
            out.put_u64(range.first().0);
            out.put_u64(range.pages().0);
        }
        out.extend_from_slice(&self.description);
        for &mtu in &self.offered_mtus {
            out.put_u16(mtu);
        }
    }
}
