//! Quick migration: the machine as an image on its home volume.
