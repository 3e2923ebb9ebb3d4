//! Signals to verbs that change an image in place, and files that cannot be removed: the chain can
//! be read at each moment.

#![cfg(target_os = "linux")]

mod support;

use std::fs;

use nix::sys::signal::Signal;
use rstest::rstest;
use support::Work;
use support::held::{Held, calls};
use test_machine::{needs, thorough};

/// Runs `command` once for each call, with a signal before it. At each of them, the newest
/// state can be read. Returns how often the work was done, and how often it was not.
fn signalled(command: &str, with: Signal, newest: &str) -> [usize; 2] {
    let work = Work::with_chain();
    let before = work.contents();
    let reset = || {
        for name in work.files() {
            fs::remove_file(work.path(&name)).unwrap();
        }
        for (name, bytes) in &before {
            fs::write(work.path(name), bytes).unwrap();
        }
    };
    let mut seen = [0; 2];
    let held = work.command(command);
    let all = calls(&held, thorough());
    reset();
    for call in &all {
        let Some(mut held) = Held::before(&held, call) else {
            reset();
            continue;
        };
        let killed = with == Signal::SIGKILL;
        match killed {
            true => held.send(with),
            false => _ = held.signal(with),
        }
        let status = held.release().0;
        work.good(&format!("diff --chain . {newest} --ram ram"));
        let done = status.code() == Some(0);
        let expected = status.code() == Some(130) || (killed && status.code().is_none());
        assert!(done || expected, "{call:?}: {status:?}");
        let staged = work.files().iter().any(|name| name.starts_with('.'));
        assert!(killed || !staged, "{call:?}: {:?}", work.files());
        seen[usize::from(done)] += 1;
        reset();
    }
    seen
}

#[rstest]
#[case::commit("commit full.mem d1.mem --remove", "d2.mem")]
#[case::commit_all("commit full.mem d1.mem d2.mem", "d2.mem")]
#[case::rebase("rebase full.mem d1.mem d2.mem --onto full.mem", "d2.mem")]
#[case::compact("compact . --keep 2", "d2.mem")]
fn the_chain_is_readable_at_each_moment(
    #[case] command: &str,
    #[case] newest: &str,
    #[values(Signal::SIGINT, Signal::SIGKILL)] with: Signal,
) {
    needs!(Strace);
    let seen = signalled(command, with, newest);
    assert!(seen[0] > 2, "{seen:?}");
}

/// The commit is done by then, and only a file that was merged is removed.
#[test]
fn a_diff_that_is_replaced_meanwhile_is_not_removed() {
    needs!(Strace);
    let work = Work::with_chain();
    work.good("dump ram -o other.mem");
    let command = work.command("commit full.mem d1.mem --remove");
    let all = calls(&command, false);
    let rename = all.iter().find(|call| call.0 == "renameat").unwrap();
    let work = Work::with_chain();
    work.good("dump ram -o other.mem");
    let held = Held::before(&work.command("commit full.mem d1.mem --remove"), rename);
    let held = held.expect("held");
    fs::rename(work.path("other.mem"), work.path("d1.mem")).unwrap();
    let (status, message) = held.release();
    assert_eq!(status.code(), Some(0), "{message}");
    assert!(message.contains("\"d1.mem\" was replaced"), "{message}");
    work.good("diff d1.mem --ram ram");
    work.good("diff full.mem d2.mem --ram ram");
}

#[test]
fn a_diff_that_cannot_be_removed_is_named() {
    use test_machine::{FileSystem, LoopMount};
    needs!(Root, Mount(FileSystem::EXT4));
    let work = Work::with_chain();
    let disk = LoopMount::new(FileSystem::EXT4).unwrap();
    for name in ["full.mem", "d1.mem"] {
        fs::copy(work.path(name), disk.path().join(name)).unwrap();
    }
    let run = |program: &str, arguments: &str| {
        let mut command = std::process::Command::new(program);
        let command = command.args(arguments.split(' ')).current_dir(disk.path());
        support::Ended::of(command)
    };
    run("chattr", "+i d1.mem").good();
    let ended = run(support::RAMSNAP, "commit full.mem d1.mem --remove");
    ended.fails(3, &["full.mem", "d1.mem", "cannot be removed: remove it"]);
    run("chattr", "-i d1.mem").good();
    fs::copy(disk.path().join("full.mem"), work.path("new.mem")).unwrap();
    work.good("diff new.mem --ram second");
}
