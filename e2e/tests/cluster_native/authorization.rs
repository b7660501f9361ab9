//! An image on a server that wants a token: who lets the operator read it, which attempt uses it, and where it is not.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, NAMESPACE};

use super::CLUSTER;
use super::bad_input::await_ready_says;
use super::imports::assert_secret;
use super::private_ca::PrivateSource;
use super::secrets::{Granted, assert_shown_nowhere, grant, put};

/// It takes half a minute, of which 20 s are the wait after the attempt with the wrong token.
#[test]
fn a_disk_is_filled_from_a_server_that_wants_a_token_which_is_shown_nowhere() {
    let name = "a_disk_is_filled_from_a_server_that_wants_a_token_which_is_shown_nowhere";
    CLUSTER.with(name, |cluster| {
        let lab = cluster.lab();
        let _granted = Granted(cluster);
        let source = PrivateSource::new(lab).unwrap().wanting(TOKEN);
        let document = cluster.document("authorized", 86);
        let disk = source.disk_with_token("{name: seed, key: token}");
        lab.apply(&document.replacen("size: 64Mi", &disk, 1))
            .unwrap();
        let vm = cluster.handle("authorized", 86);
        let says = |words: &str| {
            let object = ["vm", "authorized", "-n", NAMESPACE];
            await_ready_says(cluster, &object, "SecretUnavailable", words);
        };
        let field = "spec.disks[data].source.http.authorizationFrom";
        says(&format!(
            "{field}: the operator may not read Secret \"seed\""
        ));
        lab.apply(&grant()).unwrap();
        says(&format!("{field}: Secret \"seed\" does not exist"));

        put(lab, "token", WRONG);
        lab.wait_for("the server's refusal", NEXT_LIMIT, || {
            source.answer_waiting();
            let message = ready_message(&vm)?;
            let refusal = "http status: 401: the server refused the Authorization header of \
                           key \"token\" of Secret \"seed\"";
            ensure!(message.contains(refusal), "{message}");
            Ok(())
        })
        .unwrap();
        put(lab, "token", TOKEN);
        let node = lab.node(&vm.node().unwrap()).unwrap();
        lab.wait_for("the next attempt", NEXT_LIMIT, || {
            // The pattern does not match the command line that it is in.
            node.exec(&["pgrep", "-f", "bascule-import [f]etch"])
        })
        .unwrap();
        // The fetcher waits for an answer.
        assert_secret(&node, &vm, MARK);
        lab.wait_for("the disk to be filled", NEXT_LIMIT, || {
            source.answer_waiting();
            let vm = vm.object()?;
            let mut disks = vm["status"]["disks"].as_array().into_iter().flatten();
            let state = disks.find(|disk| disk["name"] == "data");
            let state = state.map(|disk| disk["state"].clone());
            ensure!(state == Some("Ready".into()), "{}", vm["status"]);
            Ok(())
        })
        .unwrap();
        vm.wait_ready(NEXT_LIMIT).unwrap();
        let names = ["authorizationFrom", "seed", "authorized"];
        assert_shown_nowhere(lab, &vm, names, &[MARK, "hunter2"]);
        vm.delete().unwrap();
    });
}

/// Of the condition Ready.
fn ready_message(vm: &ClusterVm<'_>) -> Result<String> {
    let vm = vm.object()?;
    let conditions = vm["status"]["conditions"].as_array();
    let ready = conditions.into_iter().flatten();
    let ready = ready.into_iter().find(|c| c["type"] == "Ready");
    let message = ready.and_then(|ready| ready["message"].as_str());
    message.map(str::to_owned).context("no message yet")
}

const MARK: &str = "correct-horse";
const TOKEN: &str = "Bearer correct-horse";
const WRONG: &str = "Bearer hunter2";
/// Longer than the wait after a failed attempt, and the next attempt.
const NEXT_LIMIT: Duration = Duration::from_secs(120);
