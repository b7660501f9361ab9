//! The native tier on this machine. Needs root and a few seconds per test; builds Kubernetes the first time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bascule_lab::image::PAUSE_IMAGE;
use bascule_lab::{Component, Lab, Network, Service, Side};

const SOON: Duration = Duration::from_secs(60);

#[test]
#[ignore = "needs root and builds Kubernetes: run with --ignored"]
fn pods_reach_services_by_name_across_nodes() -> Result<()> {
    let lab = Lab::native(2)?;
    lab.apply(&format!(
        "{}---\n{}---\n{}",
        pod(
            "server",
            "n1",
            "mkdir /w; echo hello > /w/index.html; exec httpd -f -p 8000 -h /w",
            ""
        ),
        pod("client", "n2", "exec sleep infinity", ""),
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\n\
         spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8000}]}\n"
    ))?;
    wait_pods_ready(&lab)?;
    lab.wait_for("the service to answer by its name", SOON, || {
        let url = "http://web.default.svc.cluster.local";
        let page = lab.kubectl(&["exec", "client", "--", "wget", "-qO-", url])?;
        ensure!(page == "hello\n", "it says {page:?}");
        Ok(())
    })
}

/// A VM's process is started by the node daemon's pod and must outlive it.
#[test]
#[ignore = "needs root and builds Kubernetes: run with --ignored"]
fn a_process_moved_out_of_its_privileged_pod_survives_it_but_not_the_power_cut() -> Result<()> {
    let lab = Lab::native(1)?;
    let privileged = "hostPID: true, hostNetwork: true";
    lab.apply(&pod("priv", "n1", "exec sleep infinity", privileged))?;
    wait_pods_ready(&lab)?;
    let devices = lab.kubectl(&["exec", "priv", "--", "ls", "/dev/kvm", "/dev/net/tun"])?;
    ensure!(
        devices.lines().count() == 2,
        "a privileged pod has {devices:?}"
    );

    let start = format!(
        "nsenter -t 1 -m -- sh -c {} </dev/null >/dev/null 2>&1 &",
        quoted(MOVE_OUT)
    );
    lab.kubectl(&["exec", "priv", "--", "sh", "-c", &start])?;
    let node = lab.node("n1")?;
    let alive = || node.exec(&["pgrep", "-x", "-f", "sleep 4711"]).map(drop);
    lab.wait_for("the process to run", SOON, alive)?;

    let started = Instant::now();
    lab.kubectl(&["delete", "pod", "priv", "--timeout=20s"])?;
    ensure!(
        started.elapsed() < Duration::from_secs(20),
        "the pod hung in Terminating"
    );
    alive().context("it ended with its pod")?;

    node.cut()?;
    node.boot()?;
    node.wait_ready(SOON)?;
    ensure!(alive().is_err(), "it survived a power cut");
    Ok(())
}

#[test]
#[ignore = "needs root and builds Kubernetes: run with --ignored"]
fn faults_affect_only_their_target_and_heal() -> Result<()> {
    let lab = Lab::native(2)?;
    let (n1, n2) = (lab.node("n1")?, lab.node("n2")?);
    let ping = || {
        let n2 = n2.address().to_string();
        n1.exec(&["busybox", "ping", "-c1", "-W1", &n2]).map(drop)
    };
    ping()?;
    lab.partition(
        Network::Management,
        Side::Node(n1.index()),
        Side::Node(n2.index()),
    )?;
    ensure!(ping().is_err(), "the partition lets packets through");
    lab.kubectl(&["get", "--raw", "/readyz"])
        .context("it cuts more than it should")?;
    lab.heal()?;
    lab.wait_for("the healed network", SOON, ping)?;

    let kubelet = |node: &bascule_lab::Node<'_>| -> Result<Option<i32>> {
        let services = node.services()?;
        Ok(services
            .into_iter()
            .find(|(name, _)| name == "kubelet")
            .and_then(|(_, pid)| pid))
    };
    let before = kubelet(&n1)?.context("the kubelet is down")?;
    n1.kill_service(Service::Kubelet)?;
    lab.wait_for("another kubelet", SOON, || {
        ensure!(kubelet(&n1)?.is_some_and(|pid| pid != before), "not yet");
        Ok(())
    })?;

    n2.freeze()?;
    let frozen = n2.try_exec(&["true"], None, Duration::from_secs(1));
    ensure!(frozen.is_err(), "a frozen node answered");
    n2.thaw()?;
    n2.exec(&["true"])?;

    lab.kill(Component::Apiserver)?;
    ensure!(
        lab.kubectl(&["--request-timeout=2s", "get", "nodes"])
            .is_err(),
        "who answers?"
    );
    lab.restart(Component::Apiserver)?;
    lab.kubectl(&["get", "nodes"]).map(drop)
}

#[test]
#[ignore = "needs root and builds Kubernetes: run with --ignored"]
fn nothing_is_left_of_a_lab_that_is_gone() -> Result<()> {
    let lab = Lab::native(1)?;
    let name = lab.state().name.clone();
    let address = SocketAddr::new(lab.family().hub(), 6443);
    lab.connect(address, SOON)
        .context("the API is reachable from the hub")?;
    lab.down()?;
    let left = |path: &str, what: &str| -> Result<bool> {
        let entries = std::fs::read_dir(path).with_context(|| format!("list {path}"))?;
        let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
        Ok(names.any(|name| name.to_string_lossy().starts_with(what)))
    };
    ensure!(
        !left("/run/netns", &name.netns_prefix())?,
        "a network namespace"
    );
    ensure!(
        !bascule_lab::cgroup::Cgroup::at(name.cgroup())?.exists(),
        "a cgroup"
    );
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains("bascule/labs"), "a mount");
    Ok(())
}

fn wait_pods_ready(lab: &Lab) -> Result<()> {
    lab.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod",
        "--all",
        "--timeout=60s",
    ])
    .map(drop)
}

/// A pod that runs a shell script; `spec` is more of its specification, which makes it privileged.
fn pod(name: &str, node: &str, script: &str, spec: &str) -> String {
    let (spec, privileged) = if spec.is_empty() {
        (String::new(), false)
    } else {
        (format!("{spec}, "), true)
    };
    format!(
        "apiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: default, labels: {{app: {name}}}}}\n\
         spec: {{{spec}nodeName: {node}, terminationGracePeriodSeconds: 1, containers: [{{\
         name: main, image: \"{PAUSE_IMAGE}\", imagePullPolicy: Never, \
         securityContext: {{privileged: {privileged}}}, command: [sh, -c, {script:?}]}}]}}\n"
    )
}

fn quoted(script: &str) -> String {
    format!("'{script}'")
}

/// Out of the pod's cgroup in every hierarchy, into a session of its own, and away from the pod's streams.
const MOVE_OUT: &str = r#"
for h in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ -f $h/cgroup.procs ] || continue
    mkdir -p $h/detached
    for f in cpuset.cpus cpuset.mems; do [ -f $h/$f ] && cat $h/$f > $h/detached/$f; done
    echo $$ > $h/detached/cgroup.procs
done
exec setsid sleep 4711
"#;
