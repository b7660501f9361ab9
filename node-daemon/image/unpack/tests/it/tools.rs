//! The programs that make images, and images as bytes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bascule_image_unpack::{DiskError, Piece, Qcow2Disk};

/// A folder for images.
pub(crate) struct Workshop(tempfile::TempDir);

impl Workshop {
    /// Where these programs are not installed, the caller skips with the message printed here; CI must not.
    pub(crate) fn or_skip(test: &str, programs: &[&str]) -> Option<Self> {
        for program in programs {
            let found = Command::new(program).arg("--version").output();
            if let Err(error) = found {
                assert!(std::env::var_os("CI").is_none(), "{program}: {error}");
                eprintln!("{test} is skipped: it needs {program}: {error}");
                return None;
            }
        }
        // The programs flush what they write, which is not what is tested.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Some(Self(folder.unwrap()))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Removes a file, if there is one.
    pub(crate) fn remove(&self, name: &str) {
        drop(fs::remove_file(self.path(name)));
    }

    /// Runs a program in the folder; its words are separated by spaces.
    pub(crate) fn run(&self, words: &str) -> Output {
        let mut words = words.split(' ');
        let mut command = Command::new(words.next().unwrap());
        command.current_dir(self.0.path()).args(words);
        command.output().unwrap()
    }

    pub(crate) fn must(&self, words: &str) {
        let output = self.run(words);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words}: {errors}");
    }

    /// The disk of an image as QEMU reads it; none where QEMU refuses it.
    pub(crate) fn qemu_reads(&self, image: &str) -> Option<Vec<u8>> {
        let converted = self.run(&format!(
            "qemu-img convert -f qcow2 -O raw {image} {image}.raw"
        ));
        converted
            .status
            .success()
            .then(|| fs::read(self.path(&format!("{image}.raw"))).unwrap())
    }
}

/// `input` through a program.
pub(crate) fn filter(words: &str, input: &[u8]) -> Vec<u8> {
    let mut words = words.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut stdin = process.stdin.take().unwrap();
    std::thread::scope(|scope| {
        let feeder = std::thread::Builder::new().name("feeder".to_owned());
        let feed = move || stdin.write_all(input).unwrap();
        feeder.spawn_scoped(scope, feed).unwrap();
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success());
        output.stdout
    })
}

/// The disk in an image, read in pieces of `piece` bytes.
pub(crate) fn read_disk(image: &Path, piece: usize) -> Result<Vec<u8>, DiskError> {
    let mut disk = Qcow2Disk::open(File::open(image).map_err(DiskError::Io)?)?;
    let (mut buffer, mut bytes) = (vec![0; piece], Vec::new());
    while let Some(next) = disk.next_piece(&mut buffer)? {
        match next {
            Piece::Data(length) => bytes.extend_from_slice(&buffer[..length]),
            Piece::Zeroes(length) => bytes.extend((0..length).map(|_| 0)),
        }
    }
    assert_eq!(bytes.len() as u64, disk.size());
    Ok(bytes)
}

/// A disk of `length` bytes: text, noise and zeroes in turns, of lengths that no cluster has.
pub(crate) fn disk(length: usize) -> Vec<u8> {
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::new();
    for turn in 0.. {
        let run = 3_000 + (noise % 300_000) as usize;
        if bytes.len() + run > length {
            break;
        }
        match turn % 3 {
            0 => bytes.extend(b"the same text again, ".iter().cycle().take(run)),
            1 => bytes.extend((0..run).map(|_| {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                noise.to_be_bytes()[0]
            })),
            _ => bytes.resize(bytes.len() + run, 0),
        }
    }
    bytes.resize(length, 0x77);
    bytes
}

/// `assert_eq` without megabytes of output.
pub(crate) fn assert_same(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let difference = found.iter().zip(wanted).position(|(a, b)| a != b);
    assert_eq!(difference, None, "{what}");
}
