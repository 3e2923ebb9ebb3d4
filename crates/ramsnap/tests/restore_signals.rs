//! Signals while existing RAM is overwritten.

#![cfg(target_os = "linux")]

mod support;

use std::os::unix::fs::FileExt;
use std::process::Command;

use nix::sys::signal::Signal;
use rstest::rstest;
use support::held::{ALLOCATING, Held, SHARED, calls, half_restored};
use support::ram_file::bytes;
use support::{PAGE, RAM, Work, noise};
use test_machine::needs;

/// Users press Ctrl-C twice.
#[test]
fn a_second_signal_does_not_leave_a_part_of_the_ram() {
    needs!(Strace);
    let work = Work::with_chain();
    // tmpfs reserves the stored pages run by run.
    let guest = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let path = guest.path().display().to_string();
    let guest = guest.as_file();
    guest.set_len(RAM).unwrap();
    let chain = memory_image::Chain::open_sealed(&[work.path("full.mem")]).unwrap();
    let reserving = chain.stored_runs().count();
    for call in [("pwrite64", 3), (ALLOCATING, reserving as u64 + 1)] {
        guest.write_all_at(&[7; 10], 0).unwrap();
        let command = work.command(&format!("restore full.mem -o {path} --force"));
        let call = (call.0.to_owned(), call.1.try_into().unwrap());
        let mut held = Held::before(&command, &call).expect("held");
        assert!(!held.signal(Signal::SIGINT), "it empties the RAM");
        assert!(!held.signal(Signal::SIGINT), "it goes on with that");
        let (status, error) = held.release();
        assert_eq!(status.code(), Some(130), "{error}");
        for words in [&path, "part of the RAM", "one more signal", "emptied"] {
            assert!(error.contains(words), "{error}");
        }
        assert!(bytes(guest).iter().all(|byte| *byte == 0));
    }
}

/// Returns a restore that is held before all of the RAM, which is written, goes to its disk.
fn before_the_sync(work: &Work) -> Held {
    let command = work.command("restore full.mem -o guest");
    Held::before(&command, &("fsync".to_owned(), 1)).expect("held")
}

#[test]
fn two_signals_during_the_sync_let_it_end() {
    needs!(Strace);
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = before_the_sync(&work);
    assert!(!held.signal(Signal::SIGINT));
    assert!(!held.signal(Signal::SIGINT));
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(0), "{error}");
    assert!(error.contains("all of the RAM") && error.contains("one more signal"));
    assert!(!error.contains("part of the RAM"), "{error}");
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn a_third_signal_during_the_sync_says_that_the_ram_is_whole() {
    needs!(Strace);
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = before_the_sync(&work);
    assert!(!held.signal(Signal::SIGINT));
    assert!(!held.signal(Signal::SIGTERM));
    assert!(held.signal(Signal::SIGTERM), "the third ends it");
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in ["error: ", "guest", "all of the RAM", "`sync`"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(!error.contains("part of the RAM"), "{error}");
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn a_third_signal_says_that_a_part_of_the_ram_is_left() {
    needs!(Strace);
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = half_restored(&work);
    assert!(!held.signal(Signal::SIGINT));
    assert!(!held.signal(Signal::SIGTERM));
    assert!(held.signal(Signal::SIGTERM), "the third ends it");
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in ["error: ", "guest", "part of the RAM", "start no guest"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(bytes(&guest).iter().any(|byte| *byte != 0));
}

/// Signals that end a process without a message by default.
#[rstest]
fn other_deadly_signals_leave_no_part_of_the_ram(
    #[values(
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGXCPU,
        Signal::SIGVTALRM,
        Signal::SIGPROF
    )]
    signal: Signal,
) {
    needs!(Strace);
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = half_restored(&work);
    assert!(!held.signal(signal), "it empties the RAM");
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(128 + signal as i32), "{error}");
    assert!(bytes(&guest).iter().all(|byte| *byte == 0));
}

/// Limits the memory of the held process to what it has, and some more.
fn limit_memory(held: &Held, more_kib: u64) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", held.id())).unwrap();
    let mut lines = status.lines();
    let data = lines.find_map(|line| line.strip_prefix("VmData:")).unwrap();
    let kib: u64 = data.trim().trim_end_matches(" kB").parse().unwrap();
    let mut prlimit = Command::new("prlimit");
    prlimit.arg(format!("--pid={}", held.id()));
    prlimit.arg(format!("--data={}", (kib + more_kib) << 10));
    assert!(prlimit.status().unwrap().success());
}

/// An allocation that fails ends the process at once, by SIGABRT.
#[test]
fn a_limit_of_memory_leaves_no_part_of_the_ram() {
    needs!(Strace);
    let work = Work::empty();
    // Read in the largest pieces.
    let ram = work.create("ram", RAM);
    ram.write_all_at(&noise(1, RAM), 0).unwrap();
    work.good("dump ram -o full.mem");
    let guest = work.create("guest", RAM);
    guest.write_all_at(&noise(9, PAGE), 0).unwrap();
    let restore = work.command("restore full.mem --no-verify --force -o guest");
    // The first write, of a byte as it is.
    let held = Held::before(&restore, &("pwrite64".to_owned(), 1)).expect("held");
    limit_memory(&held, 0);
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(0), "{status:?}: {error}");
    assert!(bytes(&guest) == work.read("ram"));
}

#[test]
fn ram_stays_as_it_is_if_there_is_too_little_memory() {
    needs!(Strace);
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let restore = work.command("restore full.mem --no-verify --force -o guest");
    let mut calls = calls(&restore, true).into_iter();
    let read = calls.find(|(name, _)| name == SHARED).unwrap();
    guest.write_all_at(&noise(9, PAGE), 0).unwrap();
    let before = bytes(&guest);
    // The first read of an image. The checks take less than this, and overwriting may take more.
    let held = Held::before(&restore, &read).expect("held");
    limit_memory(&held, 2 << 10);
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    assert!(
        error.contains("memory") && error.contains("as it was"),
        "{error}"
    );
    assert!(bytes(&guest) == before);
}
