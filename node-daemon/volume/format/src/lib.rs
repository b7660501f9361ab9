//! The on-disk format of a SharedVolume, version 1.

pub mod change;
