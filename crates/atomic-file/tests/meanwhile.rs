//! What others do in the same moment: look at a stage that was just made, complete the same group, fork.

#![allow(unsafe_code)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use atomic_file::{AtomicWriter, Options, recover, sweep};
use common::{assert_names, commit, group, group_state_of};
use nix::unistd::ForkResult;
use test_machine::Need;

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
        other => panic!("no such job: {other}"),
    });
}

/// What a sweeper finds while a record stands it leaves as it is: the stage is its writer's.
#[test]
fn a_stage_that_is_looked_at_as_soon_as_it_is_there_is_still_its_writers() {
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
    let log = tempfile::NamedTempFile::new().unwrap();
    thread::scope(|scope| {
        let completing = scope.spawn(|| {
            let log = log.path().to_str().unwrap();
            let delay = "inject=renameat:delay_enter=1s:when=1";
            let args = ["-o", log, "-e", "trace=renameat", "-e", delay];
            common::under_strace("recover", dir.path(), &args)
        });
        common::until_a_call_begins(log.path(), &completing);
        // Another destination's commit has nothing to wait for.
        commit(&Options::default(), &dir.path().join("other"), b"").unwrap();
        let newest = |name| commit(&Options::default(), &dir.path().join(name), b"newest").unwrap();
        newest(FILES[1]);
        newest(FILES[2]);
        assert_eq!(completing.join().unwrap().as_deref(), Some("2"));
    });
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
