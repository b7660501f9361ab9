//! The DNS names in Bascule's certificates: they tell what role the holder has.

/// The DNS name in every node's certificate. A peer checks it and the certificate authority.
pub const NODE_TLS_NAME: &str = "node.bascule.dev";
/// The DNS name in the operator's certificates, as server of Join and as client of Node.
pub const OPERATOR_TLS_NAME: &str = "operator.bascule.dev";
