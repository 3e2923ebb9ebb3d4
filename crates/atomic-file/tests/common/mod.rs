//! What the tests share: looking at directories, and running a job in a child process of its own.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use atomic_file::{AtomicGroup, AtomicWriter, CommitError, GroupCommitError, Options};

/// Every name in `dir`, sorted.
pub(crate) fn names(dir: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .expect("list")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    names.sort();
    names
}

/// Fails unless `dir` holds exactly these names.
#[track_caller]
pub(crate) fn assert_names(dir: &Path, expected: &[&str]) {
    let mut expected: Vec<_> = expected.iter().map(OsString::from).collect();
    expected.sort();
    assert_eq!(names(dir), expected, "in {}", dir.display());
}

pub(crate) fn commit(options: &Options, dest: &Path, bytes: &[u8]) -> Result<(), CommitError> {
    let writer = options.open(dest).expect("open");
    writer.write_all_at(bytes, 0).expect("write");
    writer.commit()
}

/// A temporary directory with the file `dest` holding `old`.
pub(crate) fn dir_with_old() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let dest = dir.path().join("dest");
    fs::write(&dest, "old").expect("write");
    (dir, dest)
}

const JOB: &str = "ATOMIC_FILE_TEST_JOB";
const DIR: &str = "ATOMIC_FILE_TEST_DIR";

/// The command that runs `job` on `dir` in a process of its own: this test binary again, in its test called `child`.
pub(crate) fn command(job: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test binary"));
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    command.env(JOB, job).env(DIR, dir);
    // Under `cargo run` it names many directories, and the loader's search of them would show in the trace.
    command.env_remove("LD_LIBRARY_PATH");
    command
}

/// Runs `job` on `dir` under `strace` with these arguments; what it reported, or `None` where it was killed.
pub(crate) fn under_strace<S: AsRef<OsStr>>(job: &str, dir: &Path, args: &[S]) -> Option<String> {
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
    report(strace)
}

/// Waits for the first call that strace, which `child` runs, has in its log: it's there when the call begins, which does nothing for as long as
/// it's delayed.
pub(crate) fn until_a_call_begins<T>(log: &Path, child: &ScopedJoinHandle<'_, T>) {
    while fs::read_to_string(log).expect("a log").is_empty() && !child.is_finished() {
        thread::sleep(Duration::from_millis(10));
    }
}

/// In the child: the job and its directory.
pub(crate) fn job() -> Option<(String, PathBuf)> {
    Some((std::env::var(JOB).ok()?, std::env::var_os(DIR)?.into()))
}

/// Runs the child to its end; what its job reported, or `None` where it was killed.
pub(crate) fn report(mut command: Command) -> Option<String> {
    let output = command.output().expect("start a child");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = stdout
        .lines()
        .find_map(|line| Some(line.split_once("REPORT ")?.1.to_owned()));
    assert!(
        report.is_some() || !output.status.success(),
        "a child ended well and reported nothing: {stdout}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    report
}

fn open_descriptors() -> usize {
    names(Path::new("/proc/self/fd")).len()
}

/// Runs `job` between two marks in a trace, and reports what it returned.
pub(crate) fn traced(dir: &Path, job: impl FnOnce() -> String) {
    let mark = |name: &str| {
        let _ = fs::File::open(dir.join(name));
    };
    // strace counts a thread's calls from its start, and each thread's alone: past what the harness's main thread makes
    // while it starts, a number means the job's call and no other.
    for _ in 0..100 {
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
        Err(CommitError::ReplacedStageLeft { .. }) => "replaced, left".into(),
        Err(CommitError::Unknown { .. }) => "unknown".into(),
        Err(other) => format!("{other:?}"),
    }
}

/// Writes all that the file is to hold, over what a recycled one holds.
pub(crate) fn write_whole(writer: &AtomicWriter, bytes: &[u8]) -> std::io::Result<()> {
    if writer.recycled() {
        writer.file().set_len(bytes.len() as u64)?;
    }
    writer.write_all_at(bytes, 0)
}

/// Opens, writes `new`, commits.
pub(crate) fn replace(options: &Options, dest: &Path) -> String {
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
        Err(GroupCommitError::WillBeCompleted { .. }) => "will be completed".into(),
        Err(GroupCommitError::Unknown { .. }) => "unknown".into(),
        Err(GroupCommitError::ReplacedDurabilityUnknown { .. }) => "replaced, record left".into(),
        Err(GroupCommitError::ReplacedRecordLeft { .. }) => "replaced, record left".into(),
        Err(other) => format!("{other:?}"),
    }
}

/// Stages `text` for every one of `names`, in one group.
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

/// The one text that all of `names` hold; fails where they differ.
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
