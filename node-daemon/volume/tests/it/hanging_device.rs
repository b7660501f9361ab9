//! What the kernel does for `bascule_volume::writer_lock`, on a block device whose writes hang.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bascule_types::{AlignedBuffer, VmUid};
use bascule_volume::block_device::{Access, Device, SharedDevice as _};
use bascule_volume::writer_lock::{WriterLock, writer_of};

const VM: VmUid = VmUid::from_bytes([1; 16]);
const PATIENCE: Duration = Duration::from_secs(60);

/// A loop device on a file of a file system of its own. While that is frozen, writes to the device
/// stay in the kernel.
struct HangingDevice {
    directory: tempfile::TempDir,
    path: PathBuf,
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl HangingDevice {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        run("mkfs.ext4", &["-q", text(&image)]);
        let mount = directory.path().join("m");
        std::fs::create_dir(&mount).unwrap();
        run("mount", &["-o", "loop", text(&image), text(&mount)]);
        let file = mount.join("disk");
        std::fs::write(&file, vec![0; 8 << 20]).unwrap();
        std::fs::File::open(&file).unwrap().sync_all().unwrap();
        let path = run("losetup", &["--find", "--show", text(&file)]);
        let path = PathBuf::from(path.trim());
        Self { directory, path }
    }

    fn freeze(&self, how: &str) {
        run("fsfreeze", &[how, text(&self.directory.path().join("m"))]);
    }
}

impl Drop for HangingDevice {
    fn drop(&mut self) {
        // Also after a failed assertion: a hanging write outlives everybody.
        let mount = self.directory.path().join("m");
        for (program, arguments) in [
            ("fsfreeze", ["--unfreeze", text(&mount)]),
            ("losetup", ["--detach", text(&self.path)]),
            ("umount", ["--lazy", text(&mount)]),
        ] {
            if let Err(error) = Command::new(program).args(arguments).output() {
                eprintln!("{program}: {error}");
            }
        }
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "waited for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The state of every thread of a process that has not ended.
fn thread_states(pid: u32) -> Vec<char> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).ok();
    let stats = tasks.filter_map(|task| stat(task.ok()?));
    stats
        .filter_map(|stat| stat.rsplit_once(") ")?.1.chars().next())
        .collect()
}

fn spawn_writer(device: &HangingDevice) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "hanging_device::writer_that_is_killed"])
        .args(["--ignored", "--nocapture"])
        .env("BASCULE_TEST_DEVICE", &device.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("opened") {
        said.clear();
        assert!(out.read_line(&mut said).unwrap() > 0, "the writer ended");
    }
    (child, out)
}

/// Without root a test says so and returns, but fails in CI.
fn has_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        assert!(std::env::var_os("CI").is_none(), "CI runs this as root");
        eprintln!("skipped: a loop device needs root");
    }
    is_root
}

/// A writer used to count as over when its process was gone and the device's counter of requests in
/// flight was 0. This one is a zombie with a thread that writes.
#[test]
fn i1_a_killed_process_holds_its_lock_until_its_writes_have_completed() {
    if !has_root() {
        return;
    }
    let hanging = HangingDevice::new();
    let device = Device::open(&hanging.path, Access::ReadWrite).unwrap();
    let (mut child, _out) = spawn_writer(&hanging);
    let pid = child.id();
    let writer = writer_of(VM, pid).unwrap();
    let handed = [device.identity()];
    assert_eq!(device.writer_lock(writer, &handed), WriterLock::Held);

    hanging.freeze("--freeze");
    child.stdin.as_mut().unwrap().write_all(b"write\n").unwrap();
    wait_for("a thread that hangs", || thread_states(pid).contains(&'D'));
    child.kill().unwrap();
    wait_for("the process to be gone", || writer_of(VM, pid).is_err());
    assert_eq!(device.writer_lock(writer, &handed), WriterLock::Held);

    hanging.freeze("--unfreeze");
    child.wait().unwrap();
    wait_for("the lock to be free", || {
        device.writer_lock(writer, &handed) == WriterLock::Free
    });
    let mut block = AlignedBuffer::new(4096, 4096);
    let reader = std::fs::File::open(&hanging.path).unwrap();
    reader.read_exact_at(block.bytes_mut(), 0).unwrap();
    assert_eq!(block.bytes(), [0xAB; 4096], "the write has landed");
}

/// A killed VM was not started again while its neighbours wrote: the device's counter of requests in flight, which
/// counted as its own, was never 0.
#[test]
fn a_killed_writer_is_over_while_a_neighbours_write_hangs() {
    if !has_root() {
        return;
    }
    let hanging = HangingDevice::new();
    let device = Device::open(&hanging.path, Access::ReadWrite).unwrap();
    let handed = [device.identity()];
    let (mut killed, _out) = spawn_writer(&hanging);
    let (mut neighbour, _its_out) = spawn_writer(&hanging);
    let lock_of = |child: &Child| writer_of(VM, child.id()).unwrap();
    let (writer, other) = (lock_of(&killed), lock_of(&neighbour));

    hanging.freeze("--freeze");
    let mut input = neighbour.stdin.take().unwrap();
    input.write_all(b"write\n").unwrap();
    wait_for("a thread that hangs", || {
        thread_states(neighbour.id()).contains(&'D')
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    wait_for("the lock of the killed writer to be free", || {
        device.writer_lock(writer, &handed) == WriterLock::Free
    });
    // The control: the neighbour's write is under way.
    assert!(thread_states(neighbour.id()).contains(&'D'));
    assert_eq!(device.writer_lock(other, &handed), WriterLock::Held);

    hanging.freeze("--unfreeze");
    neighbour.kill().unwrap();
    neighbour.wait().unwrap();
}

/// Not a test: the child of those above.
#[test]
#[ignore = "run by i1_a_killed_process_holds_its_lock_until_its_writes_have_completed"]
fn writer_that_is_killed() {
    let path = std::env::var_os("BASCULE_TEST_DEVICE").unwrap();
    let me = writer_of(VM, std::process::id()).unwrap();
    let device = Device::open(Path::new(&path), Access::ReadWrite).unwrap();
    let (file, _) = device.open_for(me).unwrap();
    println!("opened");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let mut block = AlignedBuffer::new(4096, 4096);
    block.bytes_mut().fill(0xAB);
    std::fs::File::from(file)
        .write_all_at(block.bytes(), 0)
        .unwrap();
    std::thread::park_timeout(PATIENCE);
}
