//! Signals before chosen calls of the main thread, or before each call if tests are thorough: a
//! verb has done all of its work, or none.

#![cfg(target_os = "linux")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use nix::sys::signal::Signal;
use rstest::rstest;
use support::held::{Call, Held, SHARED, calls};
use support::{RAMSNAP, Work, code_of};
use test_machine::{needs, thorough};

/// Runs `command` once for each call, with a signal before it. `check` gets the exit status.
/// `reset` undoes the changes of a completed run.
fn signalled(
    command: &Command,
    with: Signal,
    reset: impl Fn(),
    mut check: impl FnMut(&Call, ExitStatus),
) {
    let calls = calls(command, thorough());
    reset();
    for call in &calls {
        let Some(mut held) = Held::before(command, call) else {
            assert_eq!(call.0, SHARED, "it was not held at {call:?}");
            reset();
            continue;
        };
        held.signal(with);
        check(call, held.release().0);
        reset();
    }
}

#[rstest]
#[case::dump("dump ram -o out", Signal::SIGINT)]
#[case::dump_by_sigterm("dump ram -o out --layout sealed", Signal::SIGTERM)]
#[case::diff("diff full.mem d1.mem --ram ram -o out", Signal::SIGINT)]
#[case::merge("merge full.mem d1.mem -o out", Signal::SIGINT)]
#[case::convert("convert full.mem -o out --layout sealed", Signal::SIGTERM)]
#[case::compress("convert full.mem -o out.zst", Signal::SIGINT)]
#[case::restore("restore full.mem d1.mem -o out", Signal::SIGINT)]
#[case::hangup("dump ram -o out", Signal::SIGHUP)]
#[case::quit("merge full.mem d1.mem -o out", Signal::SIGQUIT)]
#[case::alarm("restore full.mem d1.mem -o out", Signal::SIGALRM)]
fn a_signal_leaves_all_or_nothing(#[case] command: &str, #[case] with: Signal) {
    needs!(Strace);
    let work = Work::with_chain();
    let before = work.files();
    let out = match command.contains(".zst") {
        true => "out.zst",
        false => "out",
    };
    let of_out = match command.split(' ').next() {
        Some("restore") => "diff full.mem d1.mem --ram out",
        Some("diff") => "verify full.mem d1.mem out",
        _ if out == "out.zst" => "convert out.zst -o - --zstd",
        _ => "verify out",
    };
    let reset = || drop(std::fs::remove_file(work.path(out)));
    let (mut stopped, mut done) = (0, 0);
    signalled(&work.command(command), with, reset, |call, status| {
        if work.files() == before {
            assert_eq!(status.code(), code_of(with), "{call:?}");
            stopped += 1;
            return;
        }
        assert_eq!(status.code(), Some(0), "{call:?}");
        work.good(of_out);
        std::fs::remove_file(work.path(out)).unwrap();
        assert_eq!(work.files(), before, "{call:?}");
        done += 1;
    });
    assert!(stopped > 3 && done > 0, "{stopped} {done}");
}

#[test]
fn a_signal_to_a_merge_in_place_leaves_one_of_the_bases() {
    needs!(Strace);
    let work = Work::with_chain();
    work.copy("full.mem", "old.mem");
    work.good("merge full.mem d1.mem -o new.mem");
    let before = work.files();
    let id = |name: &str| work.good(&format!("info {name} --json")).json()[0]["id"].clone();
    let (old, new) = (id("full.mem"), id("new.mem"));
    let reset = || work.copy("old.mem", "full.mem");
    let command = work.command("merge --in-place full.mem d1.mem");
    let mut seen = [0; 2];
    signalled(&command, Signal::SIGINT, reset, |call, status| {
        assert_eq!(work.files(), before, "{call:?}");
        work.good("verify full.mem");
        let done = status.code() == Some(0);
        assert!(done || status.code() == Some(130), "{call:?}: {status:?}");
        assert_eq!(id("full.mem"), if done { new.clone() } else { old.clone() });
        seen[usize::from(done)] += 1;
    });
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

#[test]
fn a_signal_to_a_restore_in_place_leaves_all_ram_or_none() {
    needs!(Strace);
    let work = Work::with_chain();
    let target = work.create("target", support::RAM);
    let command = work.command("restore full.mem d1.mem -o target --force");
    let reset = || sparse_file::punch_hole(&target, 0..support::RAM).unwrap();
    let mut seen = [0; 2];
    signalled(&command, Signal::SIGINT, reset, |call, status| {
        let done = status.code() == Some(0);
        if done {
            work.good("diff full.mem d1.mem --ram target");
        } else {
            assert_eq!(status.code(), Some(130), "{call:?}");
            // A file system may allocate a few blocks for itself.
            assert!(target.metadata().unwrap().blocks() < 100, "{call:?}");
        }
        seen[usize::from(done)] += 1;
    });
    assert!(seen[0] > 0, "{seen:?}");
}

#[rstest]
#[case::verify("verify full.mem")]
#[case::compare("diff full.mem --ram ram")]
#[case::list("list .")]
#[case::compare_images("compare full.mem full.mem")]
#[case::cat("cat full.mem --at 0 --len 1MiB")]
#[case::send("convert full.mem -o - --zstd")]
#[case::pack_and_send("convert raw:ram -o - --zstd")]
fn a_verb_that_only_reads_ends_at_once(#[case] command: &str) {
    needs!(Strace);
    let work = Work::with_chain();
    let before = work.files();
    let mut command = work.command(command);
    command.env("TMPDIR", work.path(""));
    let mut stopped = 0;
    signalled(
        &command,
        Signal::SIGINT,
        || (),
        |call, status| {
            let ended = matches!(status.code(), Some(0 | 1));
            assert!(ended || status.code() == Some(130), "{call:?}: {status:?}");
            assert_eq!(work.files(), before, "{call:?}");
            stopped += usize::from(!ended);
        },
    );
    assert!(stopped > 1, "{stopped}");
}

#[test]
fn the_demo_removes_its_directory() {
    needs!(Strace);
    let work = Work::empty();
    let mut command = work.command("demo");
    command.env("TMPDIR", work.path(""));
    for name in ["pwrite64", "fsync", "unlinkat"] {
        let mut held = Held::before(&command, &(name.to_owned(), 1)).expect("held");
        held.signal(Signal::SIGINT);
        held.release();
        assert_eq!(work.files(), [""; 0], "{name}");
    }
}

#[test]
fn a_signal_that_nohup_ignores_stays_ignored() {
    needs!(Strace);
    let work = Work::with_ram();
    for (ignored, heeded) in [
        (Signal::SIGHUP, Signal::SIGTERM),
        (Signal::SIGINT, Signal::SIGHUP),
    ] {
        let mut command = Command::new("env");
        command
            .arg(format!("--ignore-signal={}", ignored.as_str()))
            .args([RAMSNAP, "dump", "ram", "-o", "out", "--force"])
            .current_dir(work.path(""));
        let write = ("pwrite64".to_owned(), 1);
        let held = Held::before(&command, &write).expect("held");
        held.send(ignored);
        assert_eq!(held.release().0.code(), Some(0), "{ignored}");
        let mut held = Held::before(&command, &write).expect("held");
        held.signal(heeded);
        assert_eq!(held.release().0.code(), code_of(heeded));
    }
    assert_eq!(work.files(), ["out", "ram"]);
}

/// The default action of a signal applies before the tool listens.
#[test]
fn a_signal_before_it_listens_ends_the_process() {
    needs!(Strace);
    let work = Work::with_ram();
    let before = work.files();
    let command = work.command("dump ram -o out");
    let held = Held::before(&command, &("openat".to_owned(), 1)).expect("held");
    held.send(Signal::SIGINT);
    let status = held.release().0;
    assert_eq!(status.signal(), Some(Signal::SIGINT as i32));
    assert_eq!(work.files(), before);
}

/// The first signal is handled by the main thread, which can be late.
#[test]
fn the_next_writer_removes_files_left_by_a_second_signal() {
    needs!(Strace);
    let work = Work::with_ram();
    let command = work.command("dump ram -o out");
    let mut held = Held::before(&command, &("pwrite64".to_owned(), 1)).expect("held");
    assert!(!held.signal(Signal::SIGINT), "it cleans up");
    // The main thread is held still.
    assert!(held.signal(Signal::SIGTERM), "the second signal ends it");
    let (status, message) = held.release();
    assert_eq!(status.code(), Some(130));
    assert_eq!(work.files().len(), 2, "the stage is left");
    assert!(message.contains("ramsnap sweep"), "{message}");
    work.good("dump ram -o out");
    assert_eq!(work.files(), ["out", "ram"]);
}
