//! The Failover record of a restart after a node failure.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use serde_json::Value;

use super::{ClusterVm, NAMESPACE};

/// A Failover that has succeeded.
#[derive(Clone, Debug)]
pub struct Takeover {
    /// When the node was found to have no heartbeat.
    pub suspected: Timestamp,
    /// When the fence proof was recorded.
    pub proved: Timestamp,
    /// When the new node had acquired ownership.
    pub taken_over: Timestamp,
    /// When the guest had been started.
    pub started: Timestamp,
    /// The proof's kind.
    pub proof: String,
    /// The proof's detail, a sentence for administrators.
    pub detail: String,
}

impl Takeover {
    /// Each stage with its time after `since`, in whole seconds, as the API records times.
    #[must_use]
    pub fn stages(&self, since: Timestamp) -> [(&'static str, Duration); 4] {
        [
            ("suspected", self.suspected),
            ("proved", self.proved),
            ("taken over", self.taken_over),
            ("started", self.started),
        ]
        .map(|(stage, at)| (stage, Duration::try_from(at - since).unwrap_or_default()))
    }

    /// Time without a heartbeat by the coordinator's clock, and the safe time required.
    ///
    /// # Errors
    /// When the proof has no such figures.
    pub fn time_without_heartbeat(&self) -> Result<(Duration, Duration)> {
        let words = self.detail.split(' ').filter_map(|word| word.parse().ok());
        let numbers: Vec<u64> = words.collect();
        let [elapsed, required] = numbers[..] else {
            bail!("the proof has no two times: {}", self.detail);
        };
        Ok((
            Duration::from_millis(elapsed),
            Duration::from_millis(required),
        ))
    }
}

impl ClusterVm<'_> {
    /// Its Failover records, oldest first.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn failovers(&self) -> Result<Vec<Value>> {
        let sort = "--sort-by=.metadata.creationTimestamp";
        let list = self.cluster.lab.get(&["failover", "-n", NAMESPACE, sort])?;
        let items = list["items"].as_array().context("a list of Failovers")?;
        let of_vm = |item: &&Value| item["spec"]["virtualMachine"] == self.name.as_str();
        Ok(items.iter().filter(of_vm).cloned().collect())
    }

    /// Number of its takeovers.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn times_taken_over(&self) -> Result<usize> {
        let records = self.failovers()?;
        let taken = |record: &&Value| record["status"]["takenOverAt"].is_string();
        Ok(records.iter().filter(taken).count())
    }

    /// Its latest Failover, once that is complete.
    ///
    /// # Errors
    /// When there is none, or it is not complete in time.
    pub fn takeover(&self) -> Result<Takeover> {
        let what = format!("the Failover of {} to be complete", self.name);
        self.cluster.lab.wait_for(&what, RECORD_LIMIT, || {
            let records = self.failovers()?;
            read(records.last().context("there is no Failover")?)
        })
    }
}

fn read(record: &Value) -> Result<Takeover> {
    let status = &record["status"];
    let time = |field: &str| -> Result<Timestamp> {
        let text = status[field]
            .as_str()
            .with_context(|| format!("no {field} yet: {status}"))?;
        text.parse().with_context(|| format!("{field}: {text:?}"))
    };
    let text = |field: &str| {
        let text = status["proof"][field].as_str();
        text.map(str::to_owned)
            .with_context(|| format!("no {field} of a proof yet: {status}"))
    };
    Ok(Takeover {
        suspected: time("suspectedAt")?,
        proved: time("provedAt")?,
        taken_over: time("takenOverAt")?,
        started: time("startedAt")?,
        proof: text("kind")?,
        detail: text("detail")?,
    })
}

/// The record is completed shortly after the guest runs.
const RECORD_LIMIT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_record_is_complete_with_all_its_stages_and_its_proof() {
        let mut record = json!({"status": {
            "suspectedAt": "2026-01-01T00:00:05Z", "provedAt": "2026-01-01T00:00:27Z",
            "takenOverAt": "2026-01-01T00:00:28Z", "startedAt": "2026-01-01T00:00:30Z",
            "proof": {"kind": "SafeTimeElapsed", "detail": "no heartbeat for 27024 ms of the 27000 ms required"},
        }});
        let takeover = read(&record).unwrap();
        let stages = takeover.stages("2026-01-01T00:00:00Z".parse().unwrap());
        assert_eq!(stages.map(|(_, after)| after.as_secs()), [5, 27, 28, 30]);
        let (elapsed, required) = takeover.time_without_heartbeat().unwrap();
        assert_eq!(
            (elapsed.as_millis(), required.as_millis()),
            (27_024, 27_000)
        );
        record["status"]["startedAt"] = Value::Null;
        assert!(read(&record).is_err());
    }
}
