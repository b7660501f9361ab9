//! The node's UID and certificate, and where they come from.
//!
//! | file | what it is |
//! |---|---|
//! | `node_identity.rs` | `identity.json` of the state directory |
//! | `certificate.rs` | stores the certificate; tells whether it is valid and when it is due for renewal |
//! | `enrollment.rs` | on Kubernetes: exchanges the pod's token for a certificate, and renews it |
//! | `token.rs` | what the token says about the node |
//! | `authority.rs` | without Kubernetes: `bascule-node cert init` and `cert issue` |

pub(crate) mod authority;
pub(crate) mod certificate;
pub(crate) mod enrollment;
mod node_identity;
mod token;

pub(crate) use node_identity::Identity;
