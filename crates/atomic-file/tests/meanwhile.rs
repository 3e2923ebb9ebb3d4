//! What others do in the same moment: look at a stage that was just made, complete the same group, fork.

#![allow(unsafe_code)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use atomic_file::{AtomicWriter, Options, recover, sweep};
use common::{Held, assert_names, commit, group, group_state_of};
use nix::unistd::ForkResult;
use test_machine::{Need, not_run, thorough};

const RECORD: &str = ".atomic-file-group";
const FILES: [&str; 3] = ["memory", "vcpu", "devices"];

/// Not a test of its own: what `common::command` runs.
#[test]
fn child() {
    let Some((job, dir)) = common::job() else {
        return;
    };
    common::traced(&dir, || match job.as_str() {
        "group" => group_state_of(group(&dir, &FILES, "group's").unwrap().commit()),
        "recover" => format!("{:?}", recover(&dir).unwrap().completed.len()),
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
    let first = common::under_strace("name of the stage", dir.path(), &args);
    let free = common::report(common::command("name of the stage", dir.path()));
    assert_eq!(first, free, "it has its first name");
    assert!(first.unwrap().ends_with("-0.stage"));
    let trace = fs::read_to_string(&log).unwrap();
    assert_eq!(trace.matches("(INJECTED)").count(), 3, "{trace}");
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
    assert!(held.release().unwrap().ends_with("-0.stage"));
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

/// A group killed when it had renamed the first of three members.
fn half_done(dir: &Path) {
    for name in FILES {
        fs::write(dir.join(name), "old").unwrap();
    }
    let kill = ["-e", "inject=renameat:signal=KILL:when=2"];
    assert_eq!(common::under_strace("group", dir, &kill), None);
    assert!(dir.join(RECORD).exists());
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
    let inode = fs::metadata(dir.path().join(RECORD)).unwrap().ino();
    let is_waited_for = || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        let waits = |line: &str| line.contains("->") && line.contains(&format!(":{inode} "));
        locks.lines().any(waits)
    };
    thread::scope(|scope| {
        let next = scope.spawn(|| newest(FILES[1]));
        completing.wait_until(is_waited_for);
        assert_eq!(completing.release().as_deref(), Some("2"));
        next.join().unwrap();
    });
    newest(FILES[2]);
    let texts = FILES.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
    assert_eq!(texts, ["group's", "newest", "newest"]);
}

#[test]
fn a_child_that_was_forked_meanwhile_keeps_no_lock() {
    let (_dir, dest) = common::dir_with_old();
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
