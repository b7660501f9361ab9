//! What the projected service account token says about this node. The operator verifies the token when
//! the node joins; here it only tells that joining is worth a try.

use bascule_types::NodeUid;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

/// The claims of a pod's token that matter here (KEP-4193).
#[derive(Debug, Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

#[derive(Debug, Deserialize)]
struct Kubernetes {
    node: Object,
}

#[derive(Debug, Deserialize)]
struct Object {
    uid: NodeUid,
}

/// The UID of the Node object under which the kubelet requested the token; none when it does not say.
pub(super) fn node_of(token: &str) -> Option<NodeUid> {
    let claims = token.trim().split('.').nth(1)?;
    let json = URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&json).ok()?;
    Some(claims.kubernetes.node.uid)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A token as the API server makes it, but for its signature.
    pub(in crate::identity) fn token_for(node: NodeUid) -> String {
        let claims = serde_json::json!({
            "aud": ["bascule.dev"],
            "kubernetes.io": {
                "namespace": "bascule-system",
                "node": {"name": "n1", "uid": node.to_string()},
                "pod": {"name": "bascule-node-x", "uid": "u"},
            },
        });
        let encode = |json: &serde_json::Value| URL_SAFE_NO_PAD.encode(json.to_string());
        let header = encode(&serde_json::json!({"alg": "RS256"}));
        format!("{header}.{}.c2lnbmF0dXJl", encode(&claims))
    }

    #[test]
    fn a_token_names_the_node_that_it_was_requested_for() {
        let node = NodeUid::random();
        assert_eq!(node_of(&token_for(node)), Some(node));
        assert_eq!(node_of(&format!("{}\n", token_for(node))), Some(node));
    }

    #[test]
    fn a_token_that_names_no_node_says_nothing() {
        let unbound = URL_SAFE_NO_PAD.encode(r#"{"kubernetes.io":{"namespace":"x"}}"#);
        for token in ["", "a.b.c", "opaque", &format!("a.{unbound}.c"), "a.!!.c"] {
            assert_eq!(node_of(token), None, "{token}");
        }
    }
}
