//! The cluster's certificate authority. Secret bascule-ca holds its key and is readable by the operator
//! only; ConfigMap bascule-ca holds its certificate, which the DaemonSet mounts.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bascule_crds::names::FIELD_MANAGER;
use bascule_pki::{Authority, Identity};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};

/// Reads the CA from its Secret. The first replica that finds none creates it; the others read that one.
pub(crate) async fn load_or_create(client: &Client, namespace: &str) -> Result<Authority> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let authority = loop {
        if let Some(secret) = secrets
            .get_opt(SECRET)
            .await
            .context("read the CA's Secret")?
        {
            break from_secret(&secret)?;
        }
        let (_, identity) = Authority::create(namespace).context("generate the CA")?;
        match secrets
            .create(&PostParams::default(), &to_secret(&identity))
            .await
        {
            Ok(_) => tracing::info!("created the certificate authority"),
            // Another replica created the Secret first: use that CA.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error).context("write the CA's Secret"),
        }
    };
    publish(client, namespace, authority.certificate_pem()).await?;
    Ok(authority)
}

async fn publish(client: &Client, namespace: &str, certificate_pem: &str) -> Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(CONFIG_MAP.to_owned()),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(
            CERTIFICATE.to_owned(),
            certificate_pem.to_owned(),
        )])),
        ..ConfigMap::default()
    };
    maps.patch(
        CONFIG_MAP,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(&map),
    )
    .await
    .context("publish the CA's certificate")?;
    Ok(())
}

fn to_secret(identity: &Identity) -> Secret {
    let data = BTreeMap::from([
        (
            CERTIFICATE.to_owned(),
            ByteString(identity.certificate_pem.clone().into_bytes()),
        ),
        (
            KEY.to_owned(),
            ByteString(identity.key_pem.clone().into_bytes()),
        ),
    ]);
    Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.to_owned()),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    }
}

fn from_secret(secret: &Secret) -> Result<Authority> {
    let text = |key: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key));
        let bytes = bytes.with_context(|| format!("Secret {SECRET} has no {key}"))?;
        String::from_utf8(bytes.0.clone()).with_context(|| format!("Secret {SECRET}: {key}"))
    };
    Authority::from_pem(&text(CERTIFICATE)?, &text(KEY)?)
        .with_context(|| format!("read Secret {SECRET}"))
}

/// Secret with the CA's certificate and private key.
const SECRET: &str = "bascule-ca";
/// ConfigMap with the CA's certificate.
const CONFIG_MAP: &str = "bascule-ca";
const CERTIFICATE: &str = "ca.crt";
const KEY: &str = "ca.key";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_round_trips_through_its_secret() {
        let (authority, identity) = Authority::create("test").unwrap();
        let again = from_secret(&to_secret(&identity)).unwrap();
        assert_eq!(again.certificate_pem(), authority.certificate_pem());
    }

    #[test]
    fn a_secret_without_a_certificate_is_refused_by_key_name() {
        let error = from_secret(&Secret::default()).unwrap_err();
        assert!(error.to_string().contains("ca.crt"), "{error}");
    }
}
