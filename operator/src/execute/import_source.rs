//! The source of an image as a node gets it: with the header that its server wants, from a Secret (`secrets.rs`).

use std::collections::BTreeSet;

use anyhow::Result;
use bascule_node_api::command::ImportSource;
use bascule_operator_core::ImageSource;
use bascule_types::{HttpAuthorization, SecretKey, SourceAuthorization};

use crate::execute::execution::Execution;
use crate::execute::secrets::Secrets;

impl Execution<'_> {
    /// What `field` asks for. Its Secret is read for every attempt, so that a changed one is used by the next.
    pub(super) async fn import_source(
        &mut self,
        field: &str,
        source: &ImageSource,
    ) -> Result<ImportSource> {
        Ok(match source {
            ImageSource::Http {
                url,
                digest,
                ca_bundle,
                authorization_from,
            } => ImportSource::Http {
                url: url.clone(),
                digest: digest.clone(),
                ca_bundle: ca_bundle.clone(),
                authorization: match authorization_from {
                    Some(secret) => Some(self.source_authorization(field, secret).await?),
                    None => None,
                },
            },
            ImageSource::HostFile { name } => ImportSource::HostFile { name: name.clone() },
        })
    }

    async fn source_authorization(
        &mut self,
        field: &str,
        secret: &SecretKey,
    ) -> Result<SourceAuthorization> {
        let names = BTreeSet::from([secret.name.clone()]);
        let secrets = self.read_secrets(names).await?;
        match authorization(&secrets, secret) {
            Ok(value) => Ok(SourceAuthorization {
                secret: secret.clone(),
                value,
            }),
            Err(why) => {
                let message = format!("{field}.http.authorizationFrom: {why}");
                Err(self.secret_unavailable(message))
            }
        }
    }
}

fn authorization(secrets: &Secrets, secret: &SecretKey) -> Result<HttpAuthorization, String> {
    let value = HttpAuthorization::parse(secrets.bytes(secret)?);
    value.map_err(|why| format!("{secret} {why}"))
}

#[cfg(test)]
mod tests;
