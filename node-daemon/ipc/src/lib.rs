//! The local, versioned unix-socket protocols between a node's processes.
