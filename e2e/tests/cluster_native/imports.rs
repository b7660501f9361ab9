//! An image as it is published, an importer that is killed, by a signal and by the kernel for its memory, and a
//! source that stalls.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation, NAMESPACE, Talk, VOLUME};
use bascule_e2e::{ImagePacking, numbered_disk, pack};
use bascule_lab::Lab;
use bascule_lab::web::Source;
use serde_json::Value;

use super::CLUSTER;
use super::bad_input::await_ready_says;

/// It takes half a minute, of which 20 s are the wait before the second attempt.
#[test]
fn a_killed_importer_is_noticed_and_tried_again_and_a_vm_whose_source_stalls_can_be_deleted() {
    let name =
        "a_killed_importer_is_noticed_and_tried_again_and_a_vm_whose_source_stalls_can_be_deleted";
    CLUSTER.with(name, |cluster| {
        let lab = cluster.lab();
        let source = StalledSource::new(lab).unwrap();
        let (vm, first) = import_from(cluster, &source, "stalling", 80);
        // After that the stalled one is the only import.
        lab.wait_for("the kernel to be there", SAID_LIMIT, || {
            let kernel = disk(&vm, "boot-kernel")?;
            ensure!(kernel["state"] == "Ready", "{kernel}");
            Ok(())
        })
        .unwrap();
        let node = lab.node(&vm.node().unwrap()).unwrap();
        assert_secret(&node, &vm, PASSWORD);
        let group = format!("import-{}", disk_id(cluster, "stalling"));
        let groups = cgroups(&node, &group);
        assert_ne!(groups, "", "the control of the last line");

        // The parent of the one that fetches.
        node.exec(&["pkill", "-KILL", "-o", "-x", "bascule-import"])
            .unwrap();
        let killed = Instant::now();
        let object = ["vm", "stalling", "-n", NAMESPACE];
        await_ready_says(cluster, &object, "ImportFailed", "was killed");
        println!("it was told {:?} after the kill", killed.elapsed());
        let failed = disk(&vm, "data").unwrap();
        assert_eq!(failed["failedImports"], 1, "{failed}");
        assert!(failed["nextImport"].is_string(), "{failed}");
        assert_ended(first);

        starve(&node, &groups);
        lab.wait_for("the next attempt to fail", NEXT_LIMIT, || {
            let failed = disk(&vm, "data")?;
            ensure!(failed["failedImports"] == 2, "{failed}");
            Ok(())
        })
        .unwrap();
        println!(
            "the next attempt was killed for its memory {:?} after the first",
            killed.elapsed()
        );
        await_ready_says(cluster, &object, "ImportFailed", "was killed");
        vm.delete().unwrap();
        assert_eq!(cgroups(&node, &group), "", "what stays of the imports");

        let (vm, client) = import_from(cluster, &source, "stalling-too", 83);
        vm.delete().unwrap();
        assert_ended(client);
    });
}

/// The guest finds on its disk what was packed: compressed clusters, and zstd around the file.
#[test]
fn a_disk_is_filled_over_http_from_a_qcow2_image_in_zstd() {
    CLUSTER.with(
        "a_disk_is_filled_over_http_from_a_qcow2_image_in_zstd",
        |cluster| {
            let folder = tempfile::tempdir().unwrap();
            let raw = folder.path().join("raw");
            fs::write(&raw, numbered_disk(16 << 20, 1024, 200)).unwrap();
            let packing = ImagePacking {
                qcow2: Some("-c"),
                compressor: Some("zstd"),
            };
            let lab = cluster.lab();
            let image = pack(&raw, packing).unwrap();
            let Source { url, sha256, .. } = lab.publish("packed-disk", &image).unwrap();
            let disk =
                format!("size: 64Mi, source: {{http: {{url: \"{url}\", sha256: {sha256}}}}}");
            let document = cluster.document("packed", 81);
            lab.apply(&document.replacen("size: 64Mi", &disk, 1))
                .unwrap();
            let vm = cluster.handle("packed", 81);
            vm.wait_ready(NEXT_LIMIT).unwrap();
            let Talk::Probe(mut session) = vm.talk().unwrap() else {
                panic!("another guest than the probe");
            };
            let report = session.written_report(NEXT_LIMIT).unwrap();
            assert_eq!((report.disk_start, report.disk_start_bad), (200, 0));
            vm.delete().unwrap();
        },
    );
}

/// Neither a command line nor an environment of the node's processes has the password or token of the source under way,
/// nor has the VM's status.
pub(super) fn assert_secret(node: &bascule_lab::Node<'_>, vm: &ClusterVm<'_>, secret: &str) {
    // With a pattern that does not match the command line that it is in.
    let read = |files: &str, text: &str| {
        let text = format!("[{}]{}", &text[..1], &text[1..]);
        let script = format!("cat {files} 2>/dev/null | tr '\\0' ' ' | grep -c -e '{text}'; true");
        let count = node.exec(&["sh", "-c", &script]).unwrap();
        count.trim().parse::<u32>().unwrap()
    };
    // The control: the processes of the import are among those that are read.
    assert_ne!(read("/proc/[0-9]*/cmdline", "bascule-import fetch"), 0);
    for files in ["/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ"] {
        assert_eq!(read(files, secret), 0, "{files}");
    }
    let status = vm.object().unwrap()["status"].to_string();
    assert!(!status.contains(secret), "{status}");
}

/// A VM whose disk is filled from the source, and the client of its import.
fn import_from<'a>(
    cluster: &'a Installation,
    source: &StalledSource,
    name: &str,
    number: u8,
) -> (ClusterVm<'a>, TcpStream) {
    let document = cluster.document(name, number);
    let document = document.replacen("size: 64Mi", &source.disk(), 1);
    cluster.lab().apply(&document).unwrap();
    let client = source.next(cluster.lab()).unwrap();
    (cluster.handle(name, number), client)
}

/// Gives the control group, which the next attempt gets too, less memory than any program needs: the kernel kills what
/// exceeds it.
fn starve(node: &bascule_lab::Node<'_>, groups: &str) {
    let mut paths = groups.lines();
    let memory = paths.clone().find(|path| path.contains("/memory/"));
    // A host with the unified hierarchy has one directory.
    let path = memory.or_else(|| paths.next()).unwrap();
    let limit = "mkdir -p $0 && cd $0 && for f in memory.limit_in_bytes memory.max; do \
                 if [ -e $f ]; then echo 262144 >$f && cat $f; fi; done";
    let limit = node.exec(&["sh", "-c", limit, path]).unwrap();
    assert_eq!(limit.trim(), "262144", "{path} has no limit");
}

/// A disk's entry in the status of the VM.
fn disk(vm: &ClusterVm<'_>, name: &str) -> Result<Value> {
    let vm = vm.object()?;
    let mut disks = vm["status"]["disks"].as_array().into_iter().flatten();
    let found = disks.find(|disk| disk["name"] == name);
    found.cloned().with_context(|| format!("no {name} yet"))
}

/// The identifier of a VM's data disk on the volume.
fn disk_id(cluster: &Installation, vm: &str) -> String {
    let name = format!("{NAMESPACE}/{vm}.data");
    let found = cluster
        .lab()
        .wait_for("the disk on the volume", SAID_LIMIT, || {
            // A coordinator may be writing.
            let metadata = cluster.metadata(VOLUME)?;
            let mut disks = metadata.disks();
            let row = disks.find(|row| row.name.as_str() == name);
            Ok(row.context("it is not there")?.disk)
        });
    found.unwrap().to_string()
}

/// The directories of a control group, in all hierarchies.
fn cgroups(node: &bascule_lab::Node<'_>, name: &str) -> String {
    let find = ["find", "/sys/fs/cgroup", "-type", "d", "-name", name];
    // Groups of other nodes go while it looks.
    let found = node.try_exec(&find, None, SAID_LIMIT).unwrap();
    found.stdout
}

/// The client has gone: a process that is killed has its sockets closed.
fn assert_ended(mut client: TcpStream) {
    client.set_read_timeout(Some(SAID_LIMIT)).unwrap();
    let end = client.read(&mut [0; 1]);
    let reset = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionReset;
    assert!(
        end.as_ref().map_or_else(reset, |count| *count == 0),
        "the fetcher is still there: {end:?}"
    );
}

/// A web server that sends every client the first half of an image, and then nothing.
struct StalledSource(TcpListener);

impl StalledSource {
    fn new(lab: &Lab) -> Result<Self> {
        let hub = SocketAddr::new(lab.family().hub(), 0);
        let listener = lab.hub().enter(move || TcpListener::bind(hub))?;
        let listener = listener.context("listen in the hub")?;
        listener.set_nonblocking(true).context("set up a socket")?;
        Ok(Self(listener))
    }

    /// A disk that is filled from it.
    fn disk(&self) -> String {
        let address = self.0.local_addr().unwrap();
        let hash = "0".repeat(64);
        format!(
            "size: 64Mi, source: {{http: {{url: \"http://user:{PASSWORD}@{address}/image\", sha256: \"{hash}\"}}}}"
        )
    }

    /// The next client, which has half of its image.
    fn next(&self, lab: &Lab) -> Result<TcpStream> {
        let (mut client, _) = lab.wait_for("a client of the stalled source", NEXT_LIMIT, || {
            self.0.accept().context("no client")
        })?;
        client.set_nonblocking(false).context("set up a socket")?;
        let mut request = BufReader::new(client.try_clone().context("duplicate a socket")?);
        let mut line = String::new();
        while request.read_line(&mut line).context("read a request")? > 2 {
            line.clear();
        }
        let half = vec![0; IMAGE / 2];
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {IMAGE}\r\nConnection: close\r\n\r\n");
        let sent = client.write_all(head.as_bytes());
        sent.and_then(|()| client.write_all(&half))
            .context("send half of an image")?;
        Ok(client)
    }
}

const PASSWORD: &str = "Kennwort-4711";
const IMAGE: usize = 2 << 20;
const SAID_LIMIT: Duration = Duration::from_secs(60);
/// Longer than the wait after a failed attempt.
const NEXT_LIMIT: Duration = Duration::from_secs(90);
