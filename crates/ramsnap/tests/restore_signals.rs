//! Signals while existing RAM is overwritten.

#![cfg(target_os = "linux")]

mod support;

use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;
use rstest::rstest;
use support::held::{Held, half_restored};
use support::ram_file::bytes;
use support::{RAM, Work};
use test_machine::needs;

/// The system call that reserves room and makes holes.
const ALLOCATING: &str = "fallocate";

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
