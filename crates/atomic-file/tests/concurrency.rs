//! Concurrent processes: sweepers, recoveries, other groups, forks.

#![allow(unsafe_code)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use atomic_file::{AtomicWriter, AtomicWriterOptions, recover, sweep};
use nix::unistd::ForkResult;
use rstest::rstest;
use support::{Held, assert_names, commit, group, group_state_of};
use test_machine::{needs, not_run, thorough};

/// The published record of a group in progress.
const RECORD: &str = ".atomic-file-0123456789abcdef.group";
const FILES: [&str; 3] = ["memory", "vcpu", "devices"];

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    support::traced(&dir, || match job.as_str() {
        "group" => group_state_of(group(&dir, &FILES, "group's").unwrap().commit()),
        "recover" => format!("{:?}", recover(&dir).unwrap().completed.len()),
        "single" => support::replace(&AtomicWriter::options(), &dir.join(FILES[0])),
        "staged name" => {
            let writer = AtomicWriter::open(dir.join("dest")).unwrap();
            let path = writer.staged_path().display().to_string();
            writer.discard().unwrap();
            path
        }
        other => panic!("no such job: {other}"),
    });
}

/// A sweeper that inspects a new staged file holds its lock briefly.
#[test]
fn a_writer_waits_for_a_sweeper_to_unlock_its_file() {
    needs!(Strace);
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let taken = "inject=flock:error=EAGAIN:when=1..3";
    let args = [
        "-o",
        log.to_str().unwrap(),
        "-e",
        "trace=flock",
        "-e",
        taken,
    ];
    let first = support::under_strace("staged name", dir.path(), &args);
    assert!(first.unwrap().ends_with(".stage"));
    let trace = fs::read_to_string(&log).unwrap();
    assert_eq!(trace.matches("(INJECTED)").count(), 3, "{trace}");
    // The fourth attempt at the same file, and the unlock.
    assert_eq!(trace.matches("flock(").count(), 5, "{trace}");
    fs::remove_file(&log).unwrap();
    assert_names(dir.path(), &[]);
}

/// A sweeper keeps all staged files while a record exists.
#[test]
fn sweepers_keep_unlocked_new_files_while_a_record_exists() {
    needs!(Strace);
    let dir = tempfile::tempdir().unwrap();
    let record = File::create(dir.path().join(RECORD)).unwrap();
    record.lock().unwrap();
    // The staged file exists, and is not locked yet.
    let mut held = Held::start("staged name", dir.path(), "flock", "delay_enter", 1);
    held.wait_for_a_call();
    let report = sweep(dir.path()).unwrap();
    assert!(report.removed.is_empty(), "{report:?}");
    assert!(held.release().unwrap().ends_with(".stage"));
    assert_names(dir.path(), &[RECORD]);
}

#[test]
fn racing_sweepers_keep_new_staged_files() {
    const TEST: &str = "racing_sweepers_keep_new_staged_files";
    if !thorough() {
        // A sweeper without processor time holds a lock for longer than a writer waits.
        return not_run(
            TEST,
            "it depends on the scheduler: `cargo xtask prove tests` runs it",
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let record = File::create(dir.path().join(RECORD)).unwrap();
    record.lock().unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let sweeper = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                sweep(dir.path()).unwrap();
            }
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) && !sweeper.is_finished() {
            let writer = AtomicWriter::open(dir.path().join("dest")).unwrap();
            writer.discard().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_names(dir.path(), &[RECORD]);
}

fn old_files(dir: &Path) {
    for name in FILES {
        fs::write(dir.join(name), "old").unwrap();
    }
}

/// The record identifies each destination at the time of publishing, and the single commit's file
/// differs.
#[rstest]
#[case::of_an_old_file(true)]
#[case::of_no_file(false)]
fn a_commit_is_not_undone_by_an_interrupted_group(#[case] existed: bool) {
    needs!(Strace);
    let dir = tempfile::tempdir().unwrap();
    old_files(dir.path());
    if !existed {
        fs::remove_file(dir.path().join(FILES[0])).unwrap();
    }
    // The commit has looked for records, and is about to rename.
    let mut held = Held::start("single", dir.path(), "renameat", "delay_enter", 1);
    held.wait_for_a_call();
    let nth = support::RENAMES_BEFORE_MEMBERS + 1;
    let kill = format!("inject=renameat:signal=KILL:when={nth}");
    assert_eq!(
        support::under_strace("group", dir.path(), &["-e", &kill]),
        None
    );
    support::record(dir.path());
    assert_eq!(held.release().as_deref(), Some("ok"));
    recover(dir.path()).unwrap();
    let texts = FILES.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
    assert_eq!(texts, ["new", "group's", "group's"]);
    assert_names(dir.path(), &FILES);
}

/// A recovery that checked the destination just before the single commit's rename replaces it just
/// after. The commit has not returned yet.
#[test]
fn a_commit_waits_for_a_recovery_that_checked_earlier() {
    needs!(Strace);
    let dir = tempfile::tempdir().unwrap();
    old_files(dir.path());
    let mut single = Held::start("single", dir.path(), "renameat", "delay_enter", 1);
    single.wait_for_a_call();
    let nth = support::RENAMES_BEFORE_MEMBERS + 1;
    let kill = format!("inject=renameat:signal=KILL:when={nth}");
    assert_eq!(
        support::under_strace("group", dir.path(), &["-e", &kill]),
        None
    );
    let inode = fs::metadata(support::record(dir.path())).unwrap().ino();
    let mut recovery = Held::start("recover", dir.path(), "renameat", "delay_enter", 1);
    recovery.wait_for_a_call();
    thread::scope(|scope| {
        let single = scope.spawn(|| single.release());
        recovery.wait_until(|| is_waited_for(inode));
        assert_eq!(fs::read(dir.path().join(FILES[0])).unwrap(), b"new");
        assert_eq!(recovery.release().as_deref(), Some("3"));
        assert_eq!(single.join().unwrap().as_deref(), Some("ok"));
    });
    // Both were in progress, and the group renamed last. The result is final.
    commit(
        &AtomicWriterOptions::default(),
        &dir.path().join(FILES[0]),
        b"newest",
    )
    .unwrap();
    recover(dir.path()).unwrap();
    let texts = FILES.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
    assert_eq!(texts, ["newest", "group's", "group's"]);
}

/// Returns whether a process waits for the lock of the file with this inode number.
fn is_waited_for(inode: u64) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let waits = |line: &str| line.contains("->") && line.contains(&format!(":{inode} "));
    locks.lines().any(waits)
}

/// Groups with common files are serialized; others do not wait.
#[test]
fn a_stopped_group_blocks_only_groups_with_common_files() {
    needs!(Strace);
    let dir = tempfile::tempdir().unwrap();
    old_files(dir.path());
    // Its ticket exists, and its record is about to be published.
    let nth = support::RENAMES_BEFORE_MEMBERS;
    let mut held = Held::start("group", dir.path(), "renameat", "delay_enter", nth);
    let has_ticket = || {
        let is_ticket = |name: &std::ffi::OsString| name.to_string_lossy().ends_with(".intent");
        support::names(dir.path()).iter().any(is_ticket)
    };
    held.wait_until(has_ticket);
    let others = group(dir.path(), &["other", "another"], "new").unwrap();
    others.commit().unwrap();
    for name in ["other", FILES[0]] {
        commit(
            &AtomicWriterOptions::default(),
            &dir.path().join(name),
            b"newer",
        )
        .unwrap();
    }
    let sharing = group(dir.path(), &[FILES[2], "other"], "last").unwrap();
    thread::scope(|scope| {
        let sharing = scope.spawn(|| sharing.commit());
        // This does not prove that it waits; the contents of the files do.
        thread::sleep(Duration::from_millis(50));
        assert_eq!(held.release().as_deref(), Some("ok"));
        sharing.join().unwrap().unwrap();
    });
    let texts = FILES.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
    assert_eq!(texts, ["group's", "group's", "last"]);
    assert_eq!(fs::read(dir.path().join("other")).unwrap(), b"last");
    assert_names(
        dir.path(),
        &["another", "devices", "memory", "other", "vcpu"],
    );
}

/// A group killed when it had renamed the first of three members.
fn half_done(dir: &Path) {
    old_files(dir);
    let kill = ["-e", "inject=renameat:signal=KILL:when=4"];
    assert_eq!(support::under_strace("group", dir, &kill), None);
    support::record(dir);
}

/// The recovery has checked the remaining members, and is about to rename them.
#[test]
fn a_recovery_keeps_files_committed_during_it() {
    needs!(Strace);
    let dir = tempfile::tempdir().unwrap();
    half_done(dir.path());
    let mut completing = Held::start("recover", dir.path(), "renameat", "delay_enter", 1);
    completing.wait_for_a_call();
    // A commit of another destination does not wait.
    commit(
        &AtomicWriterOptions::default(),
        &dir.path().join("other"),
        b"",
    )
    .unwrap();
    let newest = |name| {
        commit(
            &AtomicWriterOptions::default(),
            &dir.path().join(name),
            b"newest",
        )
        .unwrap()
    };
    let inode = fs::metadata(support::record(dir.path())).unwrap().ino();
    thread::scope(|scope| {
        let next = scope.spawn(|| newest(FILES[1]));
        completing.wait_until(|| is_waited_for(inode));
        assert_eq!(completing.release().as_deref(), Some("2"));
        next.join().unwrap();
    });
    newest(FILES[2]);
    let texts = FILES.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
    assert_eq!(texts, ["group's", "newest", "newest"]);
}

#[test]
fn a_forked_child_keeps_no_lock() {
    let (_dir, dest) = support::dir_with_old();
    let writer = AtomicWriter::open(&dest).unwrap();
    // SAFETY: the child makes system calls only.
    let ForkResult::Parent { child } = (unsafe { nix::unistd::fork() }).unwrap() else {
        nix::unistd::alarm::set(120);
        loop {
            nix::unistd::pause();
        }
    };
    writer.commit().unwrap();
    let locked = File::open(&dest).unwrap().try_lock();
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
    nix::sys::wait::waitpid(child, None).unwrap();
    locked.unwrap();
}
