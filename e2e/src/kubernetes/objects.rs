//! Manifests that scenarios apply, and parsers of the objects' status.

use anyhow::{Context, Result, bail};
use bascule_lab::image::PAUSE_IMAGE;
use bascule_lab::{Lab, PermanentError};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::NAMESPACE;

/// Result of a VirtualMachineMigration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Moved {
    pub name: String,
    /// Live or Quick.
    pub mode: String,
    /// Source node.
    pub source: String,
    /// Target node.
    pub target: String,
    /// Phase at its end.
    pub phase: String,
    /// The blackout as the VM processes measured it.
    pub downtime: Option<String>,
    /// From the request to the end.
    pub total: Option<String>,
    /// Why it did not succeed.
    pub why: Option<String>,
    /// When the record was made, the target found, the copying begun and the attempt ended. Kubernetes' own are in whole
    /// seconds.
    pub times: Vec<(&'static str, Timestamp)>,
}

/// Succeeds when the object's condition `kind` is True; the error has its reason and message.
///
/// # Errors
/// When it is absent or not true.
pub fn condition(object: &Value, kind: &str) -> Result<()> {
    let Some(found) = find_condition(object, kind) else {
        bail!("no condition {kind} yet")
    };
    if found["status"] == "True" {
        return Ok(());
    }
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    bail!(
        "{kind} is {}: {}: {}",
        text("status"),
        text("reason"),
        text("message")
    )
}

fn find_condition<'o>(object: &'o Value, kind: &str) -> Option<&'o Value> {
    let mut conditions = object["status"]["conditions"].as_array()?.iter();
    conditions.find(|condition| condition["type"] == kind)
}

/// The result of a migration that has succeeded; [`PermanentError`] when it has failed.
pub(super) fn ended(object: &Value) -> Result<Moved> {
    let moved = read(object)?;
    match moved.phase.as_str() {
        "Succeeded" => Ok(moved),
        "Failed" | "Cancelled" | "Refused" => {
            let conditions = object["status"]["conditions"].to_string();
            Err(PermanentError(format!(
                "{} ended as {}: {}",
                moved.name,
                moved.phase,
                moved.why.unwrap_or(conditions)
            ))
            .into())
        }
        phase => bail!("it is {phase}"),
    }
}

pub(super) fn moves(lab: &Lab, vm: &str) -> Result<Vec<Moved>> {
    let list = lab.get(&[
        "vmmig",
        "-n",
        NAMESPACE,
        "--sort-by=.metadata.creationTimestamp",
    ])?;
    let items = list["items"].as_array().context("a list of migrations")?;
    let of_vm = |item: &&Value| item["spec"]["virtualMachine"] == vm;
    items.iter().filter(of_vm).map(read).collect()
}

fn read(object: &Value) -> Result<Moved> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let status = &object["status"];
    let name = text(&object["metadata"]["name"]);
    if name.is_empty() {
        bail!("not a migration: {object}");
    }
    Ok(Moved {
        name,
        mode: text(&object["spec"]["mode"]),
        source: text(&status["source"]),
        target: text(&status["target"]),
        phase: text(&status["phase"]),
        downtime: status["progress"]["measuredDowntime"]
            .as_str()
            .map(str::to_owned),
        total: status["progress"]["total"].as_str().map(str::to_owned),
        why: condition(object, "Complete")
            .err()
            .map(|error| error.to_string()),
        times: [
            (
                "migration recorded",
                &object["metadata"]["creationTimestamp"],
            ),
            ("target found", &status["placedAt"]),
            ("guest moved", &status["finishedAt"]),
        ]
        .into_iter()
        .filter_map(|(stage, at)| Some((stage, time(at)?)))
        .chain(copying_since(status).map(|at| ("target built, copying", at)))
        .collect(),
    })
}

/// When the source was told to copy: the destination was built and listened.
fn copying_since(status: &Value) -> Option<Timestamp> {
    let took: SignedDuration = status["progress"]["total"].as_str()?.parse().ok()?;
    time(&status["finishedAt"])?.checked_sub(took).ok()
}

fn time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// Since when a pod is ready, in whole seconds.
pub(super) fn ready_since(pod: &Value) -> Option<Timestamp> {
    let ready = find_condition(pod, "Ready")?;
    (ready["status"] == "True").then(|| time(&ready["lastTransitionTime"]))?
}

pub(super) fn shared_volume(name: &str, device: &str, fencing: &str) -> String {
    // LeaseOnly needs a manual fencing confirmation; the out-of-service taint may be one.
    let taint = fencing == "LeaseOnly";
    format!(
        "apiVersion: bascule.dev/v1alpha1
kind: SharedVolume
metadata: {{name: {name}}}
spec:
  backing: {{device: {{path: {device}}}}}
  fencing: {{mode: {fencing}, trustOutOfServiceTaint: {taint}}}
"
    )
}

pub(super) fn pod(name: &str, node: &str, program: &[&str]) -> String {
    let command = serde_json::json!([&["/bin/busybox"], program].concat());
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  nodeName: {node}
  restartPolicy: Never
  containers:
  - {{name: main, image: {PAUSE_IMAGE}, imagePullPolicy: Never, command: {command}}}
"
    )
}

pub(super) fn migration(name: &str, vm: &str, mode: &str, target: Option<&str>) -> String {
    let target = target
        .map(|node| format!("  target: {node}\n"))
        .unwrap_or_default();
    format!(
        "apiVersion: bascule.dev/v1alpha1
kind: VirtualMachineMigration
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  virtualMachine: {vm}
  mode: {mode}
{target}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_condition_that_is_not_true_says_why() {
        let object = json!({"status": {"conditions": [
            {"type": "Ready", "status": "False", "reason": "Importing", "message": "3 of 4"},
            {"type": "Protected", "status": "True"},
        ]}});
        assert!(condition(&object, "Protected").is_ok());
        let error = condition(&object, "Ready").unwrap_err().to_string();
        assert!(error.contains("Importing: 3 of 4"), "{error}");
        assert!(condition(&object, "Other").is_err());
    }

    #[test]
    fn the_stages_of_a_migration_come_from_its_record() {
        let object = json!({
            "metadata": {"name": "m", "creationTimestamp": "2026-11-28T16:30:01Z"},
            "spec": {"mode": "Live"},
            "status": {
                "placedAt": "2026-11-28T16:30:02Z",
                "finishedAt": "2026-11-28T16:30:33Z",
                "progress": {"total": "20s142ms"},
            },
        });
        let mut stages = read(&object).unwrap().times;
        stages.sort_by_key(|(_, at)| *at);
        let names: Vec<&str> = stages.iter().map(|(name, _)| *name).collect();
        let wanted = [
            "migration recorded",
            "target found",
            "target built, copying",
            "guest moved",
        ];
        assert_eq!(names, wanted);
        assert_eq!(stages[2].1.to_string(), "2026-11-28T16:30:12.858Z");
    }

    #[test]
    fn a_failed_migration_is_not_waited_for() {
        let object = |phase: &str| json!({"metadata": {"name": "m"}, "spec": {"mode": "Live"}, "status": {"phase": phase}});
        assert!(ended(&object("Succeeded")).is_ok());
        assert!(ended(&object("Failed")).unwrap_err().is::<PermanentError>());
        assert!(
            !ended(&object("Running"))
                .unwrap_err()
                .is::<PermanentError>()
        );
    }
}
