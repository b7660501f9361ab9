//! Starts processes that outlive the daemon and its container.
//!
//! `bascule-node` starts itself as `bascule-node launch …`. That single-threaded process joins the
//! host's namespaces, its own cgroup in every hierarchy and its own session, closes the standard
//! streams (a container whose streams are still open hangs in Terminating), and executes the
//! program. `supervisor` decides which programs run.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use sha2::{Digest, Sha256};

use super::cgroups::{self, Share};
use crate::config::NodeConfig;
use crate::paths::Paths;
use crate::wait::wait_for;

/// `bascule-node launch`: executes another program outside this container.
#[derive(Debug, clap::Args)]
pub(crate) struct LaunchArgs {
    /// Join the mount and cgroup namespaces of process 1 (set when the daemon runs in a container)
    #[arg(long)]
    host_namespaces: bool,
    /// The cgroup to create and join, in every hierarchy
    #[arg(long)]
    cgroup: Option<String>,
    /// What it is entitled to there when others want CPUs and memory too
    #[command(flatten)]
    share: Share,
    /// Leave the program its standard input
    #[arg(long)]
    stdin: bool,
    /// The file that the program's standard error is appended to
    #[arg(long)]
    stderr: PathBuf,
    /// The file that the process id is written to before the program is executed
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true)]
    command: Vec<OsString>,
}

/// `bascule-node remove-cgroup`: removes the cgroup of a program that has ended.
#[derive(Debug, clap::Args)]
pub(crate) struct RemoveCgroupArgs {
    /// Join the mount and cgroup namespaces of process 1
    #[arg(long)]
    host_namespaces: bool,
    /// Its name, in every hierarchy
    name: String,
}

/// How this node launches programs.
#[derive(Clone, Debug)]
pub(crate) struct Launcher {
    /// The folder with the programs.
    pub(crate) programs: PathBuf,
    /// Whether the daemon runs in a container, so that programs must join the host's namespaces.
    pub(crate) host_namespaces: bool,
    /// Whether to create cgroups (not in embedded mode without root).
    pub(crate) cgroups: bool,
}

impl Launcher {
    /// The launcher of this node: in a container, the programs are installed on the host first.
    pub(crate) fn new(config: &NodeConfig, in_container: bool, cgroups: bool) -> Result<Self> {
        let programs = programs_folder(config)?;
        let paths = Paths::new(&config.run_dir, &config.state_dir);
        let programs = if in_container {
            install_programs(&programs, &paths.binaries())?
        } else {
            programs
        };
        Ok(Self {
            programs,
            host_namespaces: in_container,
            cgroups,
        })
    }

    /// Starts `program` in a cgroup with a share, so that it outlives this process.
    pub(crate) fn spawn(
        &self,
        program: &str,
        place: (&str, Share),
        log: &Path,
        args: &[OsString],
    ) -> Result<Child> {
        let mut command = self.command(program, place, log, &[]);
        start(command.args(args), program)
    }

    /// Like [`Self::spawn`]; the program reads `input` from its standard input, which no other process sees and
    /// no file keeps.
    pub(crate) fn spawn_with_input(
        &self,
        program: &str,
        place: (&str, Share),
        log: &Path,
        args: &[OsString],
        input: &[u8],
    ) -> Result<Child> {
        let mut command = self.command(program, place, log, &["--stdin".as_ref()]);
        let mut child = start(command.args(args).stdin(Stdio::piped()), program)?;
        let mut pipe = child.stdin.take().context("a program's input")?;
        // A program that has ended already says why in its own way.
        match pipe.write_all(input) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                // It must not take the part that it has got for all of it.
                child.kill().and_then(|()| child.wait()).context("end it")?;
                Err(error).with_context(|| format!("give {program} its input"))
            }
            _ => Ok(child),
        }
    }

    /// Like [`Self::spawn`]; the process writes its id to `pid_file` before it becomes `program`, so that
    /// a process that runs is found by the file, also when this one ends meanwhile. Without the file's
    /// directory `program` is not executed.
    pub(crate) fn spawn_recorded(
        &self,
        program: &str,
        place: (&str, Share),
        log: &Path,
        pid_file: &Path,
        args: &[OsString],
    ) -> Result<Child> {
        let option = ["--pid-file".as_ref(), pid_file.as_os_str()];
        let mut command = self.command(program, place, log, &option);
        start(command.args(args), program)
    }

    /// Removes the cgroup of a program that has ended, if it is there. A failure is logged: nothing else
    /// depends on the removal.
    pub(crate) fn remove_cgroup(&self, cgroup: &str) {
        if let Err(error) = self.try_remove_cgroup(cgroup) {
            tracing::warn!(cgroup, error = format!("{error:#}"), "remove the cgroup");
        }
    }

    fn try_remove_cgroup(&self, cgroup: &str) -> Result<()> {
        if !self.cgroups {
            return Ok(());
        }
        let mut command = Command::new(self.programs.join("bascule-node"));
        command.arg("remove-cgroup");
        if self.host_namespaces {
            command.arg("--host-namespaces");
        }
        let removed = command
            .arg(cgroup)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("remove cgroup {cgroup}"))?;
        let error = String::from_utf8_lossy(&removed.stderr);
        ensure!(removed.status.success(), "{}", error.trim_end());
        Ok(())
    }

    /// The launch of a program without arguments, with options of the launcher.
    fn command(
        &self,
        program: &str,
        (cgroup, share): (&str, Share),
        log: &Path,
        options: &[&OsStr],
    ) -> Command {
        let mut command = Command::new(self.programs.join("bascule-node"));
        command.arg("launch").arg("--stderr").arg(log).args(options);
        if self.host_namespaces {
            command.arg("--host-namespaces");
        }
        if self.cgroups {
            command.args(["--cgroup", cgroup]).args(share.arguments());
        }
        command.arg("--").arg(self.programs.join(program));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }
}

fn start(command: &mut Command, program: &str) -> Result<Child> {
    command.spawn().with_context(|| format!("start {program}"))
}

fn programs_folder(config: &NodeConfig) -> Result<PathBuf> {
    match &config.programs {
        Some(folder) => Ok(folder.clone()),
        None => std::env::current_exe()
            .context("find this program")?
            .parent()
            .map(Path::to_owned)
            .context("find this program's folder"),
    }
}

/// Runs `bascule-node launch`. Returns only on failure.
pub(crate) fn launch(args: &LaunchArgs) -> Result<()> {
    let log = open_log(&args.stderr)?;
    let outcome = become_program(args, &log);
    if let Err(error) = &outcome {
        writeln!(&log, "bascule-node launch: {error:#}").context("write the log")?;
    }
    outcome
}

fn become_program(args: &LaunchArgs, log: &File) -> Result<()> {
    let (program, rest) = args.command.split_first().context("no program to launch")?;
    join_host_namespaces(args.host_namespaces)?;
    if let Some(name) = &args.cgroup {
        cgroups::join(name, args.share, log)?;
    }
    set_oom_score(Path::new(program), log)?;
    rustix::process::setsid().context("start a session of its own")?;
    if let Some(path) = &args.pid_file {
        write_pid(path)?;
    }
    let log = log.try_clone().context("duplicate the log")?;
    let input = if args.stdin {
        Stdio::inherit()
    } else {
        Stdio::null()
    };
    let error = Command::new(program)
        .args(rest)
        .current_dir("/")
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .exec();
    Err(error).with_context(|| format!("execute {}", program.display()))
}

/// Runs `bascule-node remove-cgroup`. Tries again for a short time: a process that has just ended may
/// still count.
pub(crate) fn remove_cgroup(args: &RemoveCgroupArgs) -> Result<()> {
    join_host_namespaces(args.host_namespaces)?;
    let mut left = None;
    let removed = wait_for(CGROUP_LIMIT, || {
        left = cgroups::remove(&args.name).err();
        left.is_none().then_some(())
    });
    match (removed, left) {
        (None, Some(error)) => Err(error),
        _ => Ok(()),
    }
}

/// Without its directory, the start that this belongs to was given up. The parent writes the same file
/// under another draft name.
fn write_pid(path: &Path) -> Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".launch");
    let written = fs::write(&draft, std::process::id().to_string());
    written
        .and_then(|()| fs::rename(&draft, path))
        .with_context(|| format!("write {}", path.display()))
}

fn join_host_namespaces(wanted: bool) -> Result<()> {
    if wanted {
        join_host("cgroup", LinkNameSpaceType::ControlGroup)?;
        join_host("mnt", LinkNameSpaceType::Mount)?;
    }
    Ok(())
}

/// Sets the OOM score so that the kernel kills other pods first when the node runs out of memory: a
/// guest's memory is requested by its reservation pod, and without `bascule-watchdog` the watchdog
/// resets the whole node. A failure, for example without root, is only logged.
fn set_oom_score(program: &Path, mut log: &File) -> Result<()> {
    let adjustment = match program.file_name().and_then(OsStr::to_str) {
        Some("bascule-watchdog" | "bascule-volume") => OOM_SCORE_OF_NODE,
        Some("bascule-vm") => OOM_SCORE_OF_GUARANTEED,
        _ => return Ok(()),
    };
    if let Err(error) = fs::write("/proc/self/oom_score_adj", adjustment) {
        writeln!(log, "bascule-node launch: oom_score_adj: {error}").context("write the log")?;
    }
    Ok(())
}

fn open_log(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    let length = log.metadata().context("measure the log")?.len();
    if length > LOG_BYTES_MAX {
        log.set_len(0).context("truncate the log")?;
    }
    Ok(log)
}

fn join_host(name: &str, kind: LinkNameSpaceType) -> Result<()> {
    let theirs = format!("/proc/1/ns/{name}");
    let mine = format!("/proc/self/ns/{name}");
    let same = fs::read_link(&theirs)
        .with_context(|| format!("read {theirs} (hostPID missing?)"))?
        == fs::read_link(&mine).with_context(|| format!("read {mine}"))?;
    if same {
        return Ok(());
    }
    let link = File::open(&theirs).with_context(|| format!("open {theirs}"))?;
    let fd: BorrowedFd<'_> = link.as_fd();
    move_into_link_name_space(fd, Some(kind)).with_context(|| format!("join {theirs}"))
}

/// Copies the programs of this release to a host path keyed by their digest, so that running
/// processes keep theirs over an upgrade, and returns that folder.
fn install_programs(from: &Path, into: &Path) -> Result<PathBuf> {
    let mut digest = Sha256::new();
    for program in PROGRAMS {
        let path = from.join(program);
        let mut file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        io::copy(&mut file, &mut HashWriter(&mut digest))
            .with_context(|| format!("read {}", path.display()))?;
    }
    let hash: String = digest
        .finalize()
        .iter()
        .take(16)
        .map(|b| format!("{b:02x}"))
        .collect();
    let target = into.join(&hash);
    if target.join(COMPLETE).exists() {
        point_at(into, &hash)?;
        return Ok(target);
    }
    fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    for program in PROGRAMS {
        let draft = target.join(format!(".{program}.new"));
        fs::copy(from.join(program), &draft).with_context(|| format!("install {program}"))?;
        fs::rename(&draft, target.join(program)).with_context(|| format!("install {program}"))?;
    }
    fs::write(target.join(COMPLETE), b"").context("mark the programs complete")?;
    point_at(into, &hash)?;
    Ok(target)
}

/// Points the link `current`, for administrators and service units, at the programs of this release.
fn point_at(into: &Path, hash: &str) -> Result<()> {
    let draft = into.join(".current.new");
    let free = match fs::remove_file(&draft) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    free.and_then(|()| symlink(hash, &draft))
        .and_then(|()| fs::rename(&draft, into.join("current")))
        .with_context(|| format!("link current in {}", into.display()))
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The guests' firmware, beside the programs (`node-daemon/vmm/firmware/build.sh`).
pub(crate) const FIRMWARE: &str = "bascule-firmware";
/// Every program that `bascule-node` starts, itself as the launcher, and the guests' firmware.
const PROGRAMS: [&str; 6] = [
    "bascule-node",
    "bascule-vm",
    "bascule-volume",
    "bascule-watchdog",
    "bascule-import",
    FIRMWARE,
];
/// In bytes. Logs are on a tmpfs, and a program in a crash loop must not fill the node's memory.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// As the kubelet has for itself (`oom_score_adj` in proc_pid_oom_score_adj(5); Kubernetes, "Node
/// out of memory behavior").
const OOM_SCORE_OF_NODE: &str = "-999";
/// As the kubelet gives to pods whose memory is all requested.
const OOM_SCORE_OF_GUARANTEED: &str = "-997";
/// The kernel lets go of a process that has ended within milliseconds.
const CGROUP_LIMIT: Duration = Duration::from_secs(2);
/// The mark of a folder into which all programs were copied.
const COMPLETE: &str = ".complete";

#[cfg(test)]
mod tests {
    use super::*;

    /// A daemon that ends between the start of a process and its own note of the id would take the process
    /// for one that has ended, and remove its files while it runs.
    #[test]
    fn a_process_writes_its_id_and_is_not_started_once_its_directory_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm/pid");
        assert!(write_pid(&path).is_err());
        fs::create_dir(folder.path().join("vm")).unwrap();
        write_pid(&path).unwrap();
        let written = fs::read_to_string(&path).unwrap();
        assert_eq!(written, std::process::id().to_string());
    }

    #[test]
    fn a_long_log_is_truncated_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/volume.log");
        open_log(&path).unwrap().write_all(b"old ").unwrap();
        open_log(&path).unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old new");
        let long = vec![b'x'; usize::try_from(LOG_BYTES_MAX).unwrap() + 1];
        fs::write(&path, long).unwrap();
        open_log(&path).unwrap().write_all(b"short").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"short");
    }

    #[test]
    fn programs_are_installed_once_under_their_digest() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("image");
        fs::create_dir(&from).unwrap();
        for program in PROGRAMS {
            fs::write(from.join(program), program).unwrap();
        }
        let into = folder.path().join("bin");
        let first = install_programs(&from, &into).unwrap();
        assert_eq!(install_programs(&from, &into).unwrap(), first);
        let current = into.join("current/bascule-node").canonicalize().unwrap();
        assert_eq!(current, first.join("bascule-node").canonicalize().unwrap());
        fs::write(from.join("bascule-vm"), "a newer release").unwrap();
        let second = install_programs(&from, &into).unwrap();
        assert_ne!(first, second);
        assert_eq!(
            into.join("current").canonicalize().unwrap(),
            second.canonicalize().unwrap()
        );
        assert_eq!(fs::read(first.join("bascule-vm")).unwrap(), b"bascule-vm");
    }
}
