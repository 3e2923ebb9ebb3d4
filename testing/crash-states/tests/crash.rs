//! Runs `cargo xtask crash`: it detects mutants, repeats a state, and leaves no files.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use test_machine::{FileSystem, Need};

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_crash-states"));
    command.arg("--no-install").args(arguments);
    command
}

fn crash(arguments: &[&str]) -> (Output, String) {
    let output = command(arguments).output().expect("it runs");
    let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    let said = said.concat();
    (output, said)
}

fn runs_here(test: &str) -> bool {
    Need::LoggedDisk.met(test) && Need::Mount(FileSystem::EXT4).met(test)
}

#[test]
fn commit_without_sync_tears_a_file_in_a_reproducible_state() {
    if !runs_here("commit_without_sync_tears_a_file_in_a_reproducible_state") {
        return;
    }
    let of = ["--only=no-file-sync", "--fs=ext4-noauto_da_alloc"];
    let (output, said) = crash(&[&of[..], &["--states=4", "--seed=1"]].concat());
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains(" 0 torn"), "{said}");
    let (_, again) = said
        .split_once("  repeat with: cargo xtask crash ")
        .expect("a command");
    let again: Vec<_> = again.lines().next().expect("a line").split(' ').collect();
    let (output, once_more) = crash(&again);
    assert_eq!(output.status.code(), Some(1), "{once_more}");
    let (_, violation) = once_more.split_once("error: ").expect("a violation");
    assert!(said.contains(violation.trim_end()), "{said}\n{once_more}");
}

#[test]
fn the_library_passes() {
    if !runs_here("the_library_passes") {
        return;
    }
    let (output, said) = crash(&[
        "--only=replace,group",
        "--fs=ext4",
        "--states=12",
        "--seed=1",
    ]);
    assert!(output.status.success(), "{said}");
    let last = said.lines().last().expect("lines");
    assert_eq!(last, "24 states, 0 lost, 0 torn", "{said}");
}

#[test]
fn a_mutant_that_is_not_found_out_fails_the_command() {
    if !runs_here("a_mutant_that_is_not_found_out_fails_the_command") {
        return;
    }
    // One state: that before anything was done.
    let of = ["--mutant=no-file-sync", "--fs=ext4-noauto_da_alloc"];
    let (output, said) = crash(&[&of[..], &["--states=1"]].concat());
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("mutants not detected: no-file-sync"),
        "{said}"
    );
}

/// The loop devices over files in `dir`, and the daemons that export them.
fn at_work(dir: &Path) -> usize {
    let dir = dir.to_str().expect("text");
    let devices = Command::new("losetup")
        .args(["--list", "--noheadings", "--output=BACK-FILE"])
        .output();
    let devices = String::from_utf8(devices.expect("losetup").stdout).expect("text");
    let devices = devices.lines().filter(|file| file.contains(dir)).count();
    let processes = fs::read_dir("/proc").expect("processes");
    let started = |process: &fs::DirEntry| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("qemu-storage-daemon") && line.contains(dir)
    };
    devices + processes.flatten().filter(started).count()
}

#[rstest]
#[case::interrupted(Signal::SIGINT)]
#[case::killed(Signal::SIGKILL)]
fn ended_early_it_leaves_no_loop_device_and_no_daemon(#[case] signal: Signal) {
    if !runs_here("ended_early_it_leaves_no_loop_device_and_no_daemon") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let mut crash = command(&["--only=replace,full", "--fs=ext4", "--states=100000"])
        .env("TMPDIR", dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut said = BufReader::new(crash.stdout.take().expect("piped")).lines();
    assert!(said.next().is_some_and(|line| line.is_ok()), "its seed");
    wait(|| at_work(dir.path()) > 0 || crash.try_wait().expect("a child").is_some());
    kill(Pid::from_raw(crash.id().cast_signed()), signal).expect("it lives");
    let output = crash.wait_with_output().expect("it ends");
    if signal == Signal::SIGINT {
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.ends_with("interrupted\n"), "{errors}");
        assert_eq!(at_work(dir.path()), 0);
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }
    // The kernel ends what a killed process had.
    wait(|| at_work(dir.path()) == 0);
}

fn wait(mut met: impl FnMut() -> bool) {
    while !met() {
        thread::sleep(Duration::from_millis(20));
    }
}
