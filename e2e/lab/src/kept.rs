//! Test labs that stay up between runs: `make scenario KEEP=1`.
//!
//! A run with `KEEP=1` uses the lab of the last run again only if it is equivalent to a new one: the same tier, number
//! of nodes, image archives and `lab` program, every node Ready and schedulable, no partition, and no failed scenario.
//! Otherwise it prints the reason and brings up a new one. A run without `KEEP=1` never uses an existing lab.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::faults;
use crate::image::sha256_file;
use crate::lab::Lab;
use crate::options::Options;
use crate::progress::say;
use crate::state::{LabPaths, State, boot_id};
use crate::tools::lab_binary;

/// Whether the environment asks for a lab that stays up: `BASCULE_LAB_KEEP` is set, and neither empty nor `0`.
pub fn keep_from_env() -> bool {
    std::env::var_os("BASCULE_LAB_KEEP").is_some_and(|value| !value.is_empty() && value != "0")
}

/// The lab that an earlier run has kept under this name, if it is as good as the new one that `options` describes.
/// `None` after a message when it is not, or when there is none.
pub(crate) fn take_again(options: &Options) -> Option<Lab> {
    match open_checked(options) {
        Ok(Some(lab)) => {
            say(&format!(
                "using the lab {} that the last run left up",
                options.name
            ));
            Some(lab)
        }
        Ok(None) => None,
        Err(error) => {
            say(&format!(
                "not using the lab {} that is there: {error:#}; bringing up a new one",
                options.name
            ));
            None
        }
    }
}

fn open_checked(options: &Options) -> Result<Option<Lab>> {
    let Some(state) = State::load(&LabPaths::new(&options.name)?)? else {
        return Ok(None);
    };
    matches(&state, options, &contents(options)?, &boot_id()?)?;
    let lab = Lab::open(&options.name)?;
    check_cluster(&lab)?;
    Ok(Some(lab))
}

/// SHA-256 of everything that a lab's nodes run and this checkout makes: the `lab` program and the image archives; and
/// whether there is a SAN.
pub(crate) fn contents(options: &Options) -> Result<Vec<String>> {
    let files = std::iter::once(lab_binary()?).chain(options.images.iter().cloned());
    let san = options.san.then(|| Ok("san".to_owned()));
    files
        .map(|file| Ok(sha256_file(&file)?.0))
        .chain(san)
        .collect()
}

fn matches(state: &State, options: &Options, contents: &[String], boot_id: &str) -> Result<()> {
    ensure!(state.complete, "it did not come up completely");
    ensure!(!state.ephemeral, "it ends with the run that made it");
    ensure!(state.boot_id == boot_id, "this machine has booted since");
    ensure!(
        state.tier == options.tier && state.nodes.len() == usize::from(options.nodes),
        "it has {} {:?} nodes, {} {:?} ones are requested",
        state.nodes.len(),
        state.tier,
        options.nodes,
        options.tier
    );
    ensure!(
        state.families == options.families,
        "its addresses are of other families than requested"
    );
    ensure!(
        state.contents == contents,
        "the image or the lab program was built anew since, or only one of the two has a SAN"
    );
    if let Some(scenario) = &state.unfinished {
        bail!("the scenario {scenario} did not succeed on it");
    }
    Ok(())
}

fn check_cluster(lab: &Lab) -> Result<()> {
    for node in lab.nodes() {
        node.wait_ready(READY_DEADLINE)
            .context("a node is not ready")?;
    }
    let cordoned = r"jsonpath={.items[?(@.spec.unschedulable==true)].metadata.name}";
    let cordoned = lab.kubectl(&["get", "nodes", "-o", cordoned])?;
    ensure!(cordoned.is_empty(), "{cordoned} is cordoned");
    ensure!(
        !faults::describe(&lab.state().name).contains("drop"),
        "a partition is left"
    );
    Ok(())
}

impl Lab {
    /// Records the scenario that has begun on the lab; `None` when it has succeeded. A lab with a recorded scenario is
    /// not used again.
    pub fn set_unfinished(&self, scenario: Option<&str>) -> Result<()> {
        self.record(|state| state.unfinished = scenario.map(str::to_owned))
    }
}

/// Nodes of a lab that is idle are Ready already; a machine that builds beside it may delay the first answer.
const READY_DEADLINE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use crate::names::NodeIndex;
    use crate::state::{NodeRecord, STATE_VERSION, Tier};

    use super::*;
    use crate::addresses::Families;

    type Change = fn(&mut State);

    #[test]
    fn a_kept_lab_is_used_again_only_if_it_equals_a_new_one() {
        let options = Options::new("unit".parse().unwrap(), Tier::Native, 1);
        let good = State {
            version: STATE_VERSION,
            name: options.name.clone(),
            tier: Tier::Native,
            families: Tier::Native.families(),
            boot_id: "boot".into(),
            logs: "/logs".into(),
            nodes: vec![NodeRecord {
                index: NodeIndex::new(1).unwrap(),
                machine: None,
            }],
            complete: true,
            ephemeral: false,
            contents: vec!["lab".into(), "image".into()],
            unfinished: None,
        };
        let contents = good.contents.clone();
        let verdict = |state: &State| matches(state, &options, &contents, "boot");
        verdict(&good).unwrap();
        let changes: [(&str, Change); 8] = [
            ("completely", |state| state.complete = false),
            ("ends with", |state| state.ephemeral = true),
            ("booted", |state| state.boot_id = "another".into()),
            ("requested", |state| state.tier = Tier::Emulated),
            ("requested", |state| state.nodes.clear()),
            ("requested", |state| state.families = Families::DUAL),
            ("built anew", |state| state.contents[1] = "other".into()),
            ("did not succeed", |state| {
                state.unfinished = Some("drain".into());
            }),
        ];
        for (why, change) in changes {
            let mut state = good.clone();
            change(&mut state);
            let error = verdict(&state).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
