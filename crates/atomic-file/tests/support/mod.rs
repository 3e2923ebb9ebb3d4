//! Shared helpers: directory listings, and jobs in child processes.

#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod faults;
pub(crate) mod groups;
#[cfg(target_os = "linux")]
pub(crate) mod hostile;
#[cfg(target_os = "linux")]
pub(crate) mod obstacles;
pub(crate) mod power_loss;
pub(crate) mod recycling;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use atomic_file::{AtomicGroup, AtomicWriter, AtomicWriterOptions, CommitError, GroupCommitError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;

/// Every name in `dir`, sorted.
pub(crate) fn names(dir: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .expect("list")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    names.sort();
    names
}

/// Returns the published group records in `dir`.
pub(crate) fn records(dir: &Path) -> Vec<PathBuf> {
    let is_record = |name: &OsString| name.to_string_lossy().ends_with(".group");
    let names = names(dir).into_iter().filter(is_record);
    names.map(|name| dir.join(name)).collect()
}

/// Returns the only published record in `dir`.
#[track_caller]
pub(crate) fn record(dir: &Path) -> PathBuf {
    let mut records = records(dir);
    assert_eq!(records.len(), 1, "{records:?}");
    records.remove(0)
}

/// The number of renames before those of members: the record is renamed to its ticket, and to
/// publish it.
pub(crate) const RENAMES_BEFORE_MEMBERS: usize = 2;

/// Fails unless `dir` holds exactly these names.
#[track_caller]
pub(crate) fn assert_names(dir: &Path, expected: &[&str]) {
    let mut expected: Vec<_> = expected.iter().map(OsString::from).collect();
    expected.sort();
    assert_eq!(names(dir), expected, "in {}", dir.display());
}

pub(crate) fn commit(
    options: &AtomicWriterOptions,
    dest: &Path,
    bytes: &[u8],
) -> Result<(), CommitError> {
    let writer = options.open(dest).expect("open");
    writer.write_all_at(bytes, 0).expect("write");
    writer.commit()
}

/// Commits `writer`, alone or as the only member of a group.
pub(crate) fn commit_writer(writer: AtomicWriter, in_group: bool) {
    if !in_group {
        return writer.commit().unwrap();
    }
    let mut group = AtomicGroup::new();
    group.add(writer).unwrap();
    group.commit().unwrap();
}

/// Returns a temporary directory with a file `dest` that contains `old`.
pub(crate) fn dir_with_old() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let dest = dir.path().join("dest");
    fs::write(&dest, "old").expect("write");
    (dir, dest)
}

const JOB: &str = "ATOMIC_FILE_TEST_JOB";
const DIR: &str = "ATOMIC_FILE_TEST_DIR";

/// Returns the command that runs `job` on `dir` in a new process: the test `child` of this test
/// binary.
pub(crate) fn command(job: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test binary"));
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    command.env(JOB, job).env(DIR, dir);
    // Under `cargo run` it lists many directories, and the loader's search would appear in the
    // trace.
    command.env_remove("LD_LIBRARY_PATH");
    command
}

/// Returns the command that runs `job` on `dir` under `strace` with these arguments.
fn strace_command<S: AsRef<OsStr>>(job: &str, dir: &Path, args: &[S]) -> Command {
    let command = command(job, dir);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq"]).args(args);
    strace.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => strace.env(key, value),
            None => strace.env_remove(key),
        };
    }
    strace
}

/// Runs `job` on `dir` under `strace` with these arguments. Returns its report, or `None` if it was
/// killed.
pub(crate) fn under_strace<S: AsRef<OsStr>>(job: &str, dir: &Path, args: &[S]) -> Option<String> {
    report(strace_command(job, dir, args))
}

/// A job that `strace` delays at a system call until [`release`](Self::release).
pub(crate) struct Held {
    /// The job itself: `strace -D` traces its parent.
    child: Child,
    log: NamedTempFile,
}

impl Held {
    /// Starts `job` on `dir`. Each of its threads is delayed at the call `call` with this number,
    /// before (`delay_enter`) or after it (`delay_exit`).
    pub(crate) fn start(job: &str, dir: &Path, call: &str, when: &str, number: usize) -> Self {
        let log = NamedTempFile::new().expect("a log");
        let path = log.path().to_str().expect("a plain path");
        let trace = format!("trace={call}");
        // The delay ends with `strace`.
        let inject = format!("inject={call}:{when}=3600s:when={number}");
        let args = ["-D", "-o", path, "-e", &trace, "-e", &inject];
        let child = strace_command(job, dir, &args)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start strace");
        Self { child, log }
    }

    /// Waits for `condition`, which must become true during the delay.
    pub(crate) fn wait_until(&mut self, condition: impl Fn() -> bool) {
        while !condition() {
            let ended = self.child.try_wait().expect("a child");
            assert_eq!(ended, None, "the job was not held: {}", self.log());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the log has a line: `strace` writes it when a call begins.
    pub(crate) fn wait_for_a_call(&mut self) {
        let log = self.log.path().to_owned();
        self.wait_until(|| fs::metadata(&log).expect("a log").len() > 0);
    }

    /// Waits until the log has this many calls with `text`.
    pub(crate) fn wait_for_calls(&mut self, text: &str, number: usize) {
        let log = self.log.path().to_owned();
        self.wait_until(|| {
            let log = fs::read_to_string(&log).expect("a log");
            log.matches(text).count() >= number
        });
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("a log")
    }

    /// Kills `strace`, which ends the delay.
    fn end_strace(&self) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let tracer = status.ok().and_then(|status| {
            let tracer = status
                .lines()
                .find_map(|line| line.strip_prefix("TracerPid:"));
            tracer?.trim().parse().ok()
        });
        if let Some(tracer @ 1..) = tracer {
            let _ = kill(Pid::from_raw(tracer), Signal::SIGKILL);
        }
    }

    /// Ends the delay, and returns the report of the job.
    pub(crate) fn release(mut self) -> Option<String> {
        self.end_strace();
        let mut stdout = String::new();
        let pipe = self.child.stdout.as_mut().expect("a pipe");
        pipe.read_to_string(&mut stdout).expect("a report");
        reported(&stdout)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.end_strace();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the job and its directory, in the child process.
pub(crate) fn job() -> Option<(String, PathBuf)> {
    Some((std::env::var(JOB).ok()?, std::env::var_os(DIR)?.into()))
}

/// Runs the child process. Returns the report of its job, or `None` if it was killed.
pub(crate) fn report(mut command: Command) -> Option<String> {
    let output = command.output().expect("start a child");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = reported(&stdout);
    assert!(
        report.is_some() || !output.status.success(),
        "a child ended well and reported nothing: {stdout}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    report
}

pub(crate) fn reported(stdout: &str) -> Option<String> {
    let mut lines = stdout.lines();
    lines.find_map(|line| Some(line.split_once("REPORT ")?.1.to_owned()))
}

fn open_descriptors() -> usize {
    names(Path::new("/proc/self/fd")).len()
}

/// Runs `job` between two marks in a trace, and reports its result.
pub(crate) fn traced(dir: &Path, job: impl FnOnce() -> String) {
    let mark = |name: &str| {
        let _ = fs::File::open(dir.join(name));
    };
    // strace counts the calls of each thread from its start. Raise the counts of this thread above
    // those of the harness's main thread, so that a number refers to a call of the job only.
    for _ in 0..30 {
        let null = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .expect("open");
        null.metadata().expect("statx");
        nix::sys::stat::fstat(&null).expect("fstat");
        nix::sys::stat::stat("/dev/null").expect("stat");
        (&null).write_all(b"x").expect("write");
        let _ = (&null).read(&mut [0]).expect("read");
        getrandom::fill(&mut [0]).expect("getrandom");
    }
    let open = open_descriptors();
    mark("mark-begin");
    let mut report = job();
    mark("mark-end");
    if open_descriptors() != open {
        report.push_str(", a descriptor stays open");
    }
    println!("\nREPORT {report}");
}

pub(crate) fn state_of(result: Result<(), CommitError>) -> String {
    match result {
        Ok(()) => "ok".into(),
        Err(CommitError::NotReplaced { leftover: None, .. }) => "not replaced".into(),
        Err(CommitError::NotReplaced { .. }) => "not replaced, left".into(),
        Err(CommitError::ReplacedDurabilityUnknown { leftover: None, .. }) => "replaced".into(),
        Err(CommitError::ReplacedDurabilityUnknown { .. }) => "replaced, left".into(),
        Err(CommitError::ReplacedCleanupFailed { .. }) => "replaced, left".into(),
        Err(CommitError::Unknown { .. }) => "unknown".into(),
        Err(other) => format!("{other:?}"),
    }
}

/// Writes the complete contents, also over those of a recycled file.
pub(crate) fn write_whole(writer: &AtomicWriter, bytes: &[u8]) -> std::io::Result<()> {
    if writer.recycled() {
        writer.file().set_len(bytes.len() as u64)?;
    }
    writer.write_all_at(bytes, 0)
}

/// Opens, writes `new`, commits.
pub(crate) fn replace(options: &AtomicWriterOptions, dest: &Path) -> String {
    match options.open(dest) {
        Err(error) => format!("not opened: {error:?}"),
        Ok(writer) => match write_whole(&writer, b"new") {
            Err(_) => "not written".into(),
            Ok(()) => state_of(writer.commit()),
        },
    }
}

pub(crate) fn group_state_of(result: Result<(), GroupCommitError>) -> String {
    match result {
        Ok(()) => "ok".into(),
        Err(GroupCommitError::NothingReplaced { leftovers, .. }) if leftovers.is_empty() => {
            "not replaced".into()
        }
        Err(GroupCommitError::NothingReplaced { .. }) => "not replaced, left".into(),
        Err(GroupCommitError::RollForwardPending { .. }) => "will be completed".into(),
        Err(GroupCommitError::Unknown { .. }) => "unknown".into(),
        Err(GroupCommitError::ReplacedDurabilityUnknown { .. }) => "replaced, record left".into(),
        Err(GroupCommitError::ReplacedRecordLeft { .. }) => "replaced, record left".into(),
        Err(other) => format!("{other:?}"),
    }
}

/// Stages `text` for each of `names`, in one group.
pub(crate) fn group(dir: &Path, names: &[&str], text: &str) -> Result<AtomicGroup, String> {
    let mut group = AtomicGroup::new();
    for name in names {
        let writer = AtomicWriter::open(dir.join(name)).map_err(|error| format!("{error:?}"))?;
        let written = writer.write_all_at(text.as_bytes(), 0);
        written.map_err(|error| format!("{error:?}"))?;
        group.add(writer).map_err(|error| error.to_string())?;
    }
    Ok(group)
}

/// Returns the text that all of `names` contain; fails if they differ.
#[track_caller]
pub(crate) fn same_text(dir: &Path, names: &[&str]) -> String {
    let texts: Vec<_> = names
        .iter()
        .map(|name| fs::read_to_string(dir.join(name)).expect("read"))
        .collect();
    assert!(
        texts.windows(2).all(|two| two[0] == two[1]),
        "a mixture: {texts:?}"
    );
    texts[0].clone()
}
