//! What others do in the same moment: look at a stage that was just made, complete the same group, fork.

#![allow(unsafe_code)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use atomic_file::{AtomicWriter, Options, recover, sweep};
use nix::unistd::ForkResult;
use rstest::rstest;
use support::{Held, assert_names, commit, group, group_state_of};
use test_machine::{Need, not_run, thorough};

/// A published record of a group that someone is committing.
const RECORD: &str = ".atomic-file-0123456789abcdef.group";
const FILES: [&str; 3] = ["memory", "vcpu", "devices"];

/// Not a test of its own: what `support::command` runs.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    support::traced(&dir, || match job.as_str() {
        "group" => group_state_of(group(&dir, &FILES, "group's").unwrap().commit()),
        "recover" => format!("{:?}", recover(&dir).unwrap().completed.len()),
        "single" => support::replace(&AtomicWriter::options(), &dir.join(FILES[0])),
        "name of the stage" => {
            let writer = AtomicWriter::open(dir.join("dest")).unwrap();
            let path = writer.temp_path().display().to_string();
            writer.discard().unwrap();
            path
        }
        other => panic!("no such job: {other}"),
    });
}

/// A sweeper that looks at a new stage has its lock for a moment.
#[test]
fn a_new_stage_that_is_looked_at_is_still_its_writers() {
    if !Need::Strace.met("a_new_stage_that_is_looked_at_is_still_its_writers") {
        return;
    }
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
    let first = support::under_strace("name of the stage", dir.path(), &args);
    assert!(first.unwrap().ends_with(".stage"));
    let trace = fs::read_to_string(&log).unwrap();
    assert_eq!(trace.matches("(INJECTED)").count(), 3, "{trace}");
    // The fourth attempt at the same file, and the unlock.
    assert_eq!(trace.matches("flock(").count(), 5, "{trace}");
    fs::remove_file(&log).unwrap();
    assert_names(dir.path(), &[]);
}

/// What a sweeper finds while a record stands it leaves as it is: the stage is its writer's.
#[test]
fn a_new_stage_is_kept_by_sweepers_while_a_record_stands() {
    const TEST: &str = "a_new_stage_is_kept_by_sweepers_while_a_record_stands";
    if !Need::Strace.met(TEST) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let record = File::create(dir.path().join(RECORD)).unwrap();
    record.lock().unwrap();
    // The stage exists, and is not locked yet.
    let mut held = Held::start("name of the stage", dir.path(), "flock", "delay_enter", 1);
    held.wait_for_a_call();
    let report = sweep(dir.path()).unwrap();
    assert!(report.removed.is_empty(), "{report:?}");
    assert!(held.release().unwrap().ends_with(".stage"));
    assert_names(dir.path(), &[RECORD]);
}

#[test]
fn racing_sweepers_leave_new_stages_to_their_writers() {
    const TEST: &str = "racing_sweepers_leave_new_stages_to_their_writers";
    if !thorough() {
        // A sweeper that is kept from the processor has a lock for longer than a writer waits.
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

/// The record says what each destination was when the group was published, and the single commit's
/// file is something else.
#[rstest]
#[case::of_an_old_file(true)]
#[case::of_no_file(false)]
fn a_commit_is_not_undone_by_a_group_that_died_meanwhile(#[case] existed: bool) {
    const TEST: &str = "a_commit_is_not_undone_by_a_group_that_died_meanwhile";
    if !Need::Strace.met(TEST) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    old_files(dir.path());
    if !existed {
        fs::remove_file(dir.path().join(FILES[0])).unwrap();
    }
    // It has looked for records, and is about to rename.
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

/// A recovery that looked at the destination just before the single commit's rename replaces it just
/// after: then the commit has not returned yet.
#[test]
fn a_commit_waits_for_a_recovery_that_looked_before_it() {
    const TEST: &str = "a_commit_waits_for_a_recovery_that_looked_before_it";
    if !Need::Strace.met(TEST) {
        return;
    }
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
    // Both were under way at once, and the group came last. From here on nothing changes it.
    commit(&Options::default(), &dir.path().join(FILES[0]), b"newest").unwrap();
    recover(dir.path()).unwrap();
    let texts = FILES.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
    assert_eq!(texts, ["newest", "group's", "group's"]);
}

/// Whether someone waits for the lock of the file with this inode number.
fn is_waited_for(inode: u64) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let waits = |line: &str| line.contains("->") && line.contains(&format!(":{inode} "));
    locks.lines().any(waits)
}

/// Groups over the same files take turns; others do not wait.
#[test]
fn a_stopped_group_holds_up_only_groups_that_share_a_file() {
    const TEST: &str = "a_stopped_group_holds_up_only_groups_that_share_a_file";
    if !Need::Strace.met(TEST) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    old_files(dir.path());
    // Its ticket is there, and its record is about to be published.
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
        commit(&Options::default(), &dir.path().join(name), b"newer").unwrap();
    }
    let sharing = group(dir.path(), &[FILES[2], "other"], "last").unwrap();
    thread::scope(|scope| {
        let sharing = scope.spawn(|| sharing.commit());
        // Not a proof that it waits: that it does is what the files say in the end.
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

/// Whoever completes it has looked at what is left to be replaced, and replaces that.
#[test]
fn what_is_committed_while_a_dead_group_is_completed_is_not_replaced_by_it() {
    if !Need::Strace.met("what_is_committed_while_a_dead_group_is_completed_is_not_replaced") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    half_done(dir.path());
    let mut completing = Held::start("recover", dir.path(), "renameat", "delay_enter", 1);
    completing.wait_for_a_call();
    // Another destination's commit has nothing to wait for.
    commit(&Options::default(), &dir.path().join("other"), b"").unwrap();
    let newest = |name| commit(&Options::default(), &dir.path().join(name), b"newest").unwrap();
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
fn a_child_that_was_forked_meanwhile_keeps_no_lock() {
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
