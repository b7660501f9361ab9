//! The serial console and its log, as users of the cluster reach them: by the plugin of kubectl, through the API server.

use std::time::Duration;

use anyhow::ensure;
use bascule_e2e::kubernetes::{Installation, NAMESPACE, PluginConsole, condition, plugin};

use super::CLUSTER;

#[test]
fn a_tenants_console_follows_the_guest_over_a_live_migration_and_the_log_survives_a_crash() {
    CLUSTER.with_vm("screen", 78, |cluster, vm| {
        let lab = cluster.lab();
        let _roles = Roles::bind(cluster);
        await_api(cluster);
        let mut console = PluginConsole::open(lab, TENANT, "screen").unwrap();
        console.output.wait_ticks(20, LIMIT).unwrap();
        console.type_in("before the move\r").unwrap();
        console
            .output
            .wait_line("echo: before the move", LIMIT)
            .unwrap();

        let moved = vm.migrate("Live", None).unwrap();
        assert_eq!(
            (moved.mode.as_str(), moved.phase.as_str()),
            ("Live", "Succeeded")
        );
        console.output.wait_ticks(20, LIMIT).unwrap();
        console.type_in("after the move\r").unwrap();
        console
            .output
            .wait_line("echo: after the move", LIMIT)
            .unwrap();
        console.output.check().unwrap();
        let numbers: Vec<u64> = console.output.ticks().iter().map(|t| t.number).collect();
        let lost = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1);
        assert_eq!(lost, None, "output was lost or doubled");
        console.detach().unwrap();
        let log = log(cluster, TENANT).unwrap();
        let came_along = log.find("echo: before the move").unwrap();
        assert!(log[came_along..].contains("echo: after the move"));

        let home = lab.node(&vm.node().unwrap()).unwrap();
        home.exec(&["pkill", "-KILL", "-x", "bascule-vm"]).unwrap();
        lab.wait_for("the guest's next boot to be logged", LIMIT, || {
            let log = self::log(cluster, TENANT)?;
            let boot = log.rfind("probe boot=");
            let crashed = log.find("echo: after the move");
            ensure!(crashed.is_some() && boot > crashed, "{boot:?} {crashed:?}");
            Ok(())
        })
        .unwrap();
        vm.wait_ready(LIMIT).unwrap();
    });
}

#[test]
fn whoever_may_only_look_types_nothing_and_reads_no_log() {
    CLUSTER.with_vm("secret", 79, |cluster, _| {
        let lab = cluster.lab();
        let _roles = Roles::bind(cluster);
        await_api(cluster);
        for verb in ["console", "logs"] {
            let refused = plugin(lab, ONLOOKER, &[verb, "secret"]).unwrap().text();
            let refused = format!("{:#}", refused.expect_err(verb));
            assert!(refused.contains("forbidden"), "{verb}: {refused}");
        }
        // The API server lets this one pass: a WebSocket begins with a GET request.
        let refused = plugin(lab, READER, &["console", "secret"]).unwrap().text();
        let refused = format!("{:#}", refused.expect_err("a reader has a console"));
        assert!(refused.contains("cannot create resource"), "{refused}");
        assert!(log_of(cluster, READER, "secret").unwrap().contains("t "));
        let missing = plugin(lab, TENANT, &["logs", "nobody"]).unwrap().text();
        let missing = format!("{:#}", missing.expect_err("a log of nothing"));
        assert!(missing.contains("not found"), "{missing}");
    });
}

fn log(cluster: &Installation, user: &str) -> anyhow::Result<String> {
    log_of(cluster, user, "screen")
}

fn log_of(cluster: &Installation, user: &str, vm: &str) -> anyhow::Result<String> {
    plugin(cluster.lab(), user, &["logs", vm])?.text()
}

fn await_api(cluster: &Installation) {
    let lab = cluster.lab();
    lab.wait_for("the operator's API", LIMIT, || {
        condition(&lab.get(&["apiservice", API])?, "Available")
    })
    .unwrap();
}

/// Who may do what in the namespace of the virtual machines, as long as this value lives.
struct Roles<'a>(&'a Installation);

impl<'a> Roles<'a> {
    fn bind(cluster: &'a Installation) -> Self {
        let roles = Self(cluster);
        let binding = |user: &str, role: &str| {
            format!(
                "apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\n\
                 metadata: {{name: {user}, namespace: {NAMESPACE}}}\n\
                 roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {role}}}\n\
                 subjects: [{{kind: User, name: {user}, apiGroup: rbac.authorization.k8s.io}}]\n---\n"
            )
        };
        let reads_everything = format!(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {{name: {READER}}}\n\
             rules: [{{apiGroups: ['*'], resources: ['*'], verbs: [get, list, watch]}}]\n"
        );
        let all = [
            binding(TENANT, "edit"),
            binding(ONLOOKER, "view"),
            binding(READER, READER),
            reads_everything,
        ];
        cluster.lab().apply(&all.concat()).unwrap();
        roles
    }
}

impl Drop for Roles<'_> {
    fn drop(&mut self) {
        let bindings = [
            "delete",
            "rolebinding",
            TENANT,
            ONLOOKER,
            READER,
            "-n",
            NAMESPACE,
        ];
        for args in [&bindings[..], &["delete", "clusterrole", READER]] {
            if let Err(error) = self.0.lab().kubectl(args) {
                eprintln!("{error:#}");
            }
        }
    }
}

const API: &str = "v1alpha1.subresources.bascule.dev";
const TENANT: &str = "console-tenant";
const ONLOOKER: &str = "console-onlooker";
const READER: &str = "console-reader";
/// A takeover on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
