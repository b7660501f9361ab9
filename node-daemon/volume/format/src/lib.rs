//! The on-disk format of a SharedVolume, version 1.
