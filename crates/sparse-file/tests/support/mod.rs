//! File systems for tests, sources of bytes, and child processes of the test binary.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use sparse_file::{ExtentKind, HostMemory, RunSource, extents};
use test_machine::{FileSystem, LoopMount, Need, TinyTmpfs};

/// A file system to run a test on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fs {
    /// The file system of the directory for temporary files.
    TempDir,
    Tmpfs,
    Ext4,
    Xfs,
    Btrfs,
    /// Without holes.
    Exfat,
}

/// A directory on a file system, and its mount.
pub enum Place {
    Dir(tempfile::TempDir),
    Tmpfs(TinyTmpfs),
    Loop(LoopMount),
}

impl Fs {
    /// Mounts the file system for `test` and returns an empty directory on it. Prints a notice and
    /// returns `None` if this machine cannot mount it.
    pub fn mount(self, test: &str) -> Option<Place> {
        let (need, fs) = match self {
            Self::TempDir => return Some(Place::Dir(tempfile::tempdir().expect("a directory"))),
            Self::Tmpfs => {
                return Need::Root
                    .met(test)
                    .then(|| Place::Tmpfs(TinyTmpfs::new(64 << 20).expect("tmpfs mounted")));
            }
            Self::Ext4 => (Need::Mount(FileSystem::EXT4), FileSystem::EXT4),
            Self::Xfs => (Need::Mount(FileSystem::XFS), FileSystem::XFS),
            Self::Btrfs => (Need::Mount(FileSystem::BTRFS), FileSystem::BTRFS),
            Self::Exfat => (Need::Mount(FileSystem::EXFAT), FileSystem::EXFAT),
        };
        need.met(test)
            .then(|| Place::Loop(LoopMount::new(fs).expect("image mounted")))
    }
}

impl Place {
    pub fn path(&self) -> &Path {
        match self {
            Self::Dir(dir) => dir.path(),
            Self::Tmpfs(tmpfs) => tmpfs.path(),
            Self::Loop(mount) => mount.path(),
        }
    }

    pub fn file(&self) -> File {
        tempfile::tempfile_in(self.path()).expect("a file")
    }
}

/// Returns `len` bytes without a zero byte. All pages differ.
pub fn ram(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at.wrapping_mul(31) ^ (at >> 12).wrapping_mul(97)) as u8 | 1)
        .collect()
}

pub fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("metadata").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

/// A source that is read and does not expose its address.
pub struct Copied<'a>(pub &'a [u8]);

impl RunSource for Copied<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
}

/// Bytes of which the first is `shift` bytes after an address that is aligned for all direct I/O.
pub struct Shifted {
    bytes: Vec<u8>,
    range: Range<usize>,
}

impl Shifted {
    const ALIGNMENT: usize = 64 << 10;

    pub fn new(bytes: &[u8], shift: usize) -> Self {
        let mut moved = vec![0; bytes.len() + Self::ALIGNMENT + shift];
        let start = moved.as_ptr().align_offset(Self::ALIGNMENT) + shift;
        let range = start..start + bytes.len();
        moved[range.clone()].copy_from_slice(bytes);
        Self {
            bytes: moved,
            range,
        }
    }
}

impl std::ops::Deref for Shifted {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

/// Memory in mappings of 5000 bytes, every third of which must be read: pieces smaller than a
/// chunk, of both kinds.
pub struct Pieces<'a>(pub &'a [u8]);

impl RunSource for Pieces<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let end = (offset / 5000 + 1) * 5000;
        (!(offset / 5000).is_multiple_of(3))
            .then(|| self.0.host_memory(offset, len.min((end - offset) as usize)))
            .flatten()
    }
}

pub fn go_on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Returns the union of `runs`, sorted and joined.
pub fn union(runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut runs: Vec<_> = runs.iter().filter(|run| !run.is_empty()).cloned().collect();
    runs.sort_by_key(|run| run.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

const CHILD: &str = "SPARSE_FILE_TEST_CHILD";

/// Returns the task for which [`child`] started this process, if it did.
pub fn child_task() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// Returns a command that runs only `test` of this binary, with `task` for [`child_task`].
pub fn child(test: &str, task: &str) -> Command {
    through(Command::new(exe()), test, task)
}

/// Returns the same command under `strace`, which injects `inject` into every `call`. The trace is
/// written to `log`.
pub fn strace_child(
    call: &str,
    inject: &str,
    log: Option<&Path>,
    test: &str,
    task: &str,
) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e"]);
    strace.arg(format!("inject={call}:{inject}"));
    strace
        .arg("-o")
        .arg(log.unwrap_or(Path::new("/dev/null")))
        .arg(exe());
    through(strace, test, task)
}

fn through(mut command: Command, test: &str, task: &str) -> Command {
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, task);
    command
}

fn exe() -> PathBuf {
    std::env::current_exe().expect("own path")
}

/// Runs the command and fails with its output unless one test ran and passed.
pub fn expect_success(mut command: Command) {
    let output = command.output().expect("started");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && stdout.contains("1 passed"),
        "{:?}\n{stdout}\n{stderr}",
        output.status
    );
}

/// Returns the ranges of the file that are data.
pub fn data(file: &File) -> Vec<Range<u64>> {
    let listed = extents(file).expect("listed");
    let listed = listed.map(|extent| extent.expect("listed"));
    listed
        .filter(|extent| extent.kind == ExtentKind::Data)
        .map(|extent| extent.range)
        .collect()
}
