//! `cargo xtask test`, `ci` and `prove` as their user meets them: lists, errors, signals.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(arguments);
    command
}

fn xtask(arguments: &[&str]) -> Output {
    command(arguments).output().expect("it runs")
}

#[test]
fn the_steps_that_are_named_are_listed() {
    let output = xtask(&["ci", "--list", "crash", "macos"]);
    let listed = String::from_utf8_lossy(&output.stdout);
    let names: Vec<_> = listed
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(names, ["crash", "macos"]);
    let output = xtask(&["ci", "--list", "formatting"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn what_is_no_revision_is_not_taken_for_an_option() {
    for revision in ["--all", "-h", "nonsense", "HEAD:README.md"] {
        let output = xtask(&["prove", "--list", &format!("--changed={revision}")]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{revision}: {errors}");
        let expected = format!("error: {revision:?} is not a revision;");
        assert!(errors.starts_with(&expected), "{errors}");
    }
}

/// The step takes an hour.
#[test]
fn a_suite_that_is_ended_ends_what_it_started() {
    let mut suite = command(&["prove", "soak"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let said = BufReader::new(suite.stdout.take().expect("piped")).lines();
    let mut said = said.map(|line| line.expect("text"));
    assert!(said.any(|line| line.starts_with("seed ")), "it begins");
    kill(Pid::from_raw(suite.id().cast_signed()), Signal::SIGTERM).expect("it lives");
    // All that it started had this pipe, too.
    said.for_each(drop);
    let mut errors = String::new();
    let stderr = suite.stderr.as_mut().expect("piped");
    stderr.read_to_string(&mut errors).expect("text");
    assert_eq!(suite.wait().expect("it ends").code(), Some(1), "{errors}");
    assert!(errors.contains("error: interrupted"), "{errors}");
    assert!(errors.contains("soak failed after"), "{errors}");
}
