//! What the scenarios on the lab's SAN need: its SharedVolume, virtual machines on it, and their processes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_lab::Node;

use super::{ClusterVm, Installation, NAMESPACE, SAN_VOLUME, address, objects};

/// The process of a virtual machine on a node, and what it has open there.
#[derive(Clone, Debug)]
pub struct VmProcess {
    /// Process id on the node.
    pub pid: u64,
    /// Start time, in clock ticks after the node's boot.
    started: u64,
}

impl Installation {
    /// Applies a SharedVolume on the lab's SAN and waits until every node reaches it. Emulated tier
    /// only.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn san_volume(&self) -> Result<()> {
        self.lab.apply(&objects::shared_volume(
            SAN_VOLUME,
            bascule_lab::SAN_DEVICE,
            "Watchdog",
        ))?;
        self.wait_volume_on(SAN_VOLUME)
    }

    /// As [`Self::vm`], with its disks on the volume of [`Self::san_volume`].
    ///
    /// # Errors
    /// As [`Self::vm`].
    pub fn san_vm(&self, name: &str, number: u8) -> Result<ClusterVm<'_>> {
        let document = self.guest.document(name, address(number), SAN_VOLUME);
        self.start(&document, self.san_handle(name, number))
    }

    /// As [`Self::san_vm`], on this node, with `onError: Pause` for its disk.
    ///
    /// # Errors
    /// As [`Self::vm`].
    pub fn pausing_san_vm(&self, name: &str, number: u8, node: &str) -> Result<ClusterVm<'_>> {
        let document = self.guest.document(name, address(number), SAN_VOLUME);
        let disk = "deletionPolicy: Delete}";
        ensure!(document.contains(disk), "no disk in {document}");
        let document = document.replace(disk, "deletionPolicy: Delete, onError: Pause}");
        let selector =
            format!("  placement: {{nodeSelector: {{kubernetes.io/hostname: {node}}}}}\n");
        self.start(&(document + &selector), self.san_handle(name, number))
    }

    fn san_handle(&self, name: &str, number: u8) -> ClusterVm<'_> {
        ClusterVm {
            volume: SAN_VOLUME,
            ..self.handle(name, number)
        }
    }
}

impl ClusterVm<'_> {
    /// Its process on `node`.
    ///
    /// # Errors
    /// When there is none.
    pub fn process(&self, node: &Node<'_>) -> Result<VmProcess> {
        let uid = self.object()?["metadata"]["uid"].clone();
        let uid = uid.as_str().context("a VirtualMachine without a UID")?;
        let script = "for p in $(pgrep -x bascule-vm); do tr '\\0' ' ' < /proc/$p/cmdline | \
                      grep -q \"$1\" && sed \"s/^/$p /\" /proc/$p/stat; done; true";
        let found = node.exec(&["sh", "-c", script, "sh", uid])?;
        let what = || format!("no process of {NAMESPACE}/{}: {found:?}", self.name);
        let (pid, stat) = found.trim().split_once(' ').with_context(what)?;
        // proc_pid_stat(5): field 22, counted from the state behind the name.
        let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
        let started = fields.and_then(|fields| fields.split(' ').nth(19));
        Ok(VmProcess {
            pid: pid.parse().with_context(what)?,
            started: started.and_then(|s| s.parse().ok()).with_context(what)?,
        })
    }
}

impl VmProcess {
    /// Kills it: no thread of it runs on, and its requests in flight stay.
    ///
    /// # Errors
    /// When it is not there.
    pub fn kill(&self, node: &Node<'_>) -> Result<()> {
        node.exec(&["kill", "-KILL", &self.pid.to_string()])
            .map(drop)
    }

    /// Waits until it executes nothing any more: it is gone, or a zombie, or its last threads wait in the kernel.
    ///
    /// # Errors
    /// When it does in time.
    pub fn wait_dead(&self, node: &Node<'_>) -> Result<()> {
        bascule_lab::wait_for("the killed process to end", DEATH_LIMIT, || {
            let status = format!("/proc/{}/cmdline", self.pid);
            let outcome = node.try_exec(&["cat", &status], None, DEATH_LIMIT)?;
            // The memory of a dead process is gone, and its command line with it.
            ensure!(outcome.stdout.is_empty(), "it is {}", outcome.stdout);
            Ok(())
        })
    }

    /// Whether its byte of the device is locked on the node: it has a descriptor open or a request in flight
    /// (docs/adr/0006).
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn holds_its_lock(&self, node: &Node<'_>) -> Result<bool> {
        let byte = self.started << PID_BITS | self.pid;
        let locks = node.exec(&["cat", "/proc/locks"])?;
        let of_process = |line: &&str| line.ends_with(&format!(" {byte} {byte}"));
        Ok(locks.lines().any(|line| of_process(&line)))
    }
}

/// As in `node-daemon/volume/src/writer_lock.rs`.
const PID_BITS: u32 = 22;
/// Memory is freed in milliseconds on a real node.
const DEATH_LIMIT: Duration = Duration::from_secs(30);
