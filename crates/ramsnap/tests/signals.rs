//! Signals at any moment of a verb: it has done all of its work, or none.

mod support;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use support::{RAMSNAP, Work, code_of, noise};
use test_machine::{not_run, thorough};

/// The size of the RAM, which is sparse and has enough data for the work to take a while.
const SIZE: u64 = 4 << 30;
const DATA: u64 = 128 << 20;

/// The moment of the signal.
#[derive(Clone, Copy, Debug)]
enum Moment {
    After(Duration),
    /// As soon as a new file exists.
    Staged,
}

const MOMENTS: [Moment; 7] = [
    Moment::After(Duration::ZERO),
    Moment::After(Duration::from_millis(3)),
    Moment::After(Duration::from_millis(10)),
    Moment::After(Duration::from_millis(30)),
    Moment::After(Duration::from_millis(100)),
    Moment::Staged,
    Moment::After(Duration::from_secs(60)),
];

/// `ram`, `full.mem` of what it was before, `d1.mem`.
fn large() -> Work {
    let work = Work::empty();
    let ram = work.create("ram", SIZE);
    let fill = |seed: u64| {
        let block = noise(seed, 1 << 20);
        for number in 0..DATA >> 20 {
            ram.write_all_at(&block, number * (24 << 20)).unwrap();
            ram.write_all_at(&number.to_le_bytes(), number * (24 << 20))
                .unwrap();
        }
    };
    fill(1);
    work.good("dump ram -o full.mem");
    fill(2);
    work.good("diff full.mem --ram ram -o d1.mem");
    work
}

fn signal(child: &Child, signal: Signal) {
    // The process may have ended. It was not waited for, so its id is not reused.
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

/// Returns whether tests that depend on the time of a signal run; if not, prints that `test` is
/// skipped.
fn may_race(test: &str) -> bool {
    if !thorough() {
        not_run(
            test,
            "it depends on when signals come: `cargo xtask prove tests` runs it",
        );
    }
    thorough()
}

/// Sends the signal at `moment`, and waits for the process to end.
fn interrupted(work: &Work, command: &mut Command, moment: Moment, with: Signal) -> ExitStatus {
    let before = work.files().len();
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let due = |ended: bool| match moment {
        _ if ended => true,
        Moment::After(delay) => start.elapsed() >= delay,
        Moment::Staged => work.files().len() > before,
    };
    while !due(child.try_wait().unwrap().is_some()) {
        sleep(Duration::from_micros(200));
    }
    if child.try_wait().unwrap().is_none() {
        signal(&child, with);
    }
    child.wait().unwrap()
}

/// Waits until the process handles SIGINT.
#[cfg(target_os = "linux")]
fn until_it_listens(child: &Child) {
    let status = format!("/proc/{}/status", child.id());
    let listens = || {
        let status = std::fs::read_to_string(&status).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = u64::from_str_radix(caught.unwrap().trim(), 16).unwrap();
        caught >> (Signal::SIGINT as u32 - 1) & 1 == 1
    };
    while !listens() {
        sleep(Duration::from_millis(1));
    }
}

/// Returns whether the tool handled the signal, or was ended by it before it began to listen.
fn was_interrupted(status: ExitStatus, with: Signal) -> bool {
    status.code() == code_of(with) || status.signal() == Some(with as i32)
}

#[rstest]
#[case::dump("dump ram -o out", Signal::SIGINT)]
#[case::dump_by_sigterm("dump ram -o out --layout sealed", Signal::SIGTERM)]
#[case::diff("diff full.mem --ram ram -o out", Signal::SIGINT)]
#[case::merge("merge full.mem d1.mem -o out", Signal::SIGINT)]
#[case::convert("convert full.mem -o out --layout sealed", Signal::SIGTERM)]
#[case::restore("restore full.mem d1.mem -o out", Signal::SIGINT)]
fn a_signal_at_any_time_leaves_all_or_nothing(#[case] command: &str, #[case] with: Signal) {
    if !may_race("a_signal_at_any_time_leaves_all_or_nothing") {
        return;
    }
    let work = large();
    let before = work.files();
    let mut stopped = 0;
    for moment in MOMENTS {
        let status = interrupted(&work, &mut work.command(command), moment, with);
        if work.files() == before {
            assert!(was_interrupted(status, with), "{moment:?}: {status:?}");
            stopped += usize::from(status.code() == code_of(with));
            continue;
        }
        assert_eq!(status.code(), Some(0), "{moment:?}");
        let is = match command.starts_with("restore") {
            true => "diff full.mem d1.mem --ram out",
            false => "verify out",
        };
        work.good(is);
        std::fs::remove_file(work.path("out")).unwrap();
        assert_eq!(work.files(), before, "{moment:?}");
    }
    assert!(stopped > 0, "no signal was in time");
}

#[test]
fn a_signal_at_any_time_leaves_one_of_the_bases() {
    if !may_race("a_signal_at_any_time_leaves_one_of_the_bases") {
        return;
    }
    let work = large();
    let before = work.files();
    let old = work.good("info full.mem --json").json()[0]["id"].clone();
    for moment in MOMENTS {
        let mut command = work.command("merge --in-place full.mem d1.mem");
        let status = interrupted(&work, &mut command, moment, Signal::SIGINT);
        assert_eq!(work.files(), before, "{moment:?}");
        work.good("verify full.mem");
        let id = work.good("info full.mem --json").json()[0]["id"].clone();
        if status.code() == Some(0) {
            assert_ne!(id, old);
            return work.good("diff full.mem --ram ram").out.truncate(0);
        }
        assert!(
            was_interrupted(status, Signal::SIGINT),
            "{moment:?}: {status:?}"
        );
        assert_eq!(id, old);
    }
    panic!("the last one had time");
}

#[test]
fn a_signal_at_any_time_leaves_all_ram_or_none() {
    if !may_race("a_signal_at_any_time_leaves_all_ram_or_none") {
        return;
    }
    let work = large();
    let target = work.create("target", SIZE);
    for moment in MOMENTS {
        let mut command = work.command("restore full.mem d1.mem -o target --force");
        let status = interrupted(&work, &mut command, moment, Signal::SIGINT);
        if status.code() == Some(0) {
            work.good("diff full.mem d1.mem --ram target");
        } else {
            assert!(
                was_interrupted(status, Signal::SIGINT),
                "{moment:?}: {status:?}"
            );
            // A file system may allocate a few blocks for itself.
            assert!(target.metadata().unwrap().blocks() < 100, "{moment:?}");
        }
        sparse_file::punch_hole(&target, 0..SIZE).unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_stream_that_stalls_is_interrupted_and_leaves_nothing() {
    let work = Work::with_chain();
    let before = work.files();
    let mut command = work.command("convert - --zstd -o out");
    // No process writes to the pipe.
    let mut child = command
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until_it_listens(&child);
    signal(&child, Signal::SIGINT);
    let stdin = child.stdin.take();
    let status = child.wait().unwrap();
    drop(stdin);
    assert_eq!(status.code(), Some(130));
    assert_eq!(work.files(), before);
}

#[rstest]
#[case::verify("verify full.mem")]
#[case::compare("diff full.mem --ram ram")]
#[case::send("convert full.mem -o - --zstd")]
#[case::pack_and_send("convert raw:ram -o - --zstd")]
fn a_signal_at_any_time_ends_a_verb_that_reads(#[case] command: &str) {
    if !may_race("a_signal_at_any_time_ends_a_verb_that_reads") {
        return;
    }
    let work = large();
    let before = work.files();
    for moment in MOMENTS {
        let mut command = work.command(command);
        let command = command.env("TMPDIR", work.path(""));
        let status = interrupted(&work, command, moment, Signal::SIGINT);
        let ended = matches!(status.code(), Some(0 | 1));
        assert!(
            ended || was_interrupted(status, Signal::SIGINT),
            "{moment:?}: {status:?}"
        );
        assert_eq!(work.files(), before, "{moment:?}");
    }
}

#[test]
fn a_demo_signalled_at_any_time_removes_its_files() {
    if !may_race("a_demo_signalled_at_any_time_removes_its_files") {
        return;
    }
    let work = Work::empty();
    for moment in MOMENTS {
        let mut command = Command::new(RAMSNAP);
        let command = command.arg("demo").env("TMPDIR", work.path(""));
        interrupted(&work, command, moment, Signal::SIGINT);
        assert_eq!(work.files(), [""; 0], "{moment:?}");
    }
}
