//! The OEM fields in the header of every table.

pub(super) const OEM_ID: [u8; 6] = *b"BASCUL";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"BASCULE ";
/// Rises with every change to the tables.
pub(super) const OEM_REVISION: u32 = 3;
