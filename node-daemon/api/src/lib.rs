//! The gRPC API between operator and nodes.
