//! Rejects fields that the kind does not have. An API server warns about them; without one, a misspelt field would be left out without an error.

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Checks that the VirtualMachine kind has every field of a document.
pub(super) fn check_fields(document: &Value) -> Result<()> {
    let kinds = bascule_crds::crds();
    let kind = kinds.first().context("the API has no kinds")?;
    let kind = serde_json::to_value(kind).context("write the kind's schema")?;
    let schema = kind.pointer("/spec/versions/0/schema/openAPIV3Schema/properties/spec");
    let schema = schema.context("the kind has no schema")?;
    let spec = document.get("spec").unwrap_or(&Value::Null);
    match unknown(spec, schema, "spec") {
        Some(field) => bail!("{field}: a VirtualMachine has no such field"),
        None => Ok(()),
    }
}

/// The path of the first field of `value` that `schema` does not know.
fn unknown(value: &Value, schema: &Value, path: &str) -> Option<String> {
    match value {
        Value::Object(fields) => {
            let properties = schema.get("properties")?;
            let open = schema.get("additionalProperties").is_some()
                || schema.get("x-kubernetes-preserve-unknown-fields").is_some();
            fields.iter().find_map(|(name, field)| {
                let path = format!("{path}.{name}");
                match properties.get(name) {
                    Some(schema) => unknown(field, schema, &path),
                    None => (!open).then_some(path),
                }
            })
        }
        Value::Array(items) => {
            let schema = schema.get("items")?;
            let mut numbered = items.iter().enumerate();
            numbered.find_map(|(index, item)| unknown(item, schema, &format!("{path}[{index}]")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_error_has_the_path_of_a_misspelt_field() {
        let document = |spec: Value| json!({"metadata": {"anything": 1}, "spec": spec});
        let good = json!({
            "memory": "1Gi",
            "boot": {"kernel": {"hostFile": {"name": "k"}}},
            "disks": [{"name": "data", "size": "1Gi"}],
            "placement": {"nodeSelector": {"any": "label"}},
        });
        check_fields(&document(good)).unwrap();
        for (spec, path) in [
            (json!({"memroy": "1Gi"}), "spec.memroy"),
            (json!({"boot": {"kernal": {}}}), "spec.boot.kernal"),
            (
                json!({"disks": [{"name": "a"}, {"name": "b", "sise": 1}]}),
                "spec.disks[1].sise",
            ),
        ] {
            let error = check_fields(&document(spec)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{path}: ")), "{error}");
        }
    }
}
