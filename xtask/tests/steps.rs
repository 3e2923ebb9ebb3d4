//! `cargo xtask test`, `ci` and `prove` as their user meets them: lists, errors, signals.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;

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

/// Runs `cargo xtask ARGUMENTS` with a program in the place of cargo. Returns what the program saw.
fn cargo_of_step(arguments: &[&str]) -> (Output, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let cargo = dir.path().join("cargo");
    let script = "#!/bin/sh\necho \"$* no-install=$RAMSNAP_NO_INSTALL\" > \"$SEEN\"\n";
    fs::write(&cargo, script).expect("written");
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).expect("executable");
    let path = std::env::var("PATH").expect("a path");
    let seen = dir.path().join("seen");
    let not_run = dir.path().join("not-run.txt");
    fs::write(&not_run, "").expect("written");
    let output = command(arguments)
        .env("PATH", format!("{}:{path}", dir.path().display()))
        .env("SEEN", &seen)
        .env("RAMSNAP_NOT_RUN", not_run)
        .env_remove("RAMSNAP_NO_INSTALL")
        .output()
        .expect("it runs");
    (output, fs::read_to_string(&seen).expect("it was run"))
}

#[rstest]
#[case::may_install(&[], "no-install=\n")]
#[case::must_not_install(&["--no-install"], "no-install=1\n")]
fn no_install_reaches_the_programs_of_steps(#[case] options: &[&str], #[case] end: &str) {
    let (output, seen) = cargo_of_step(&[&["ci", "macos"], options].concat());
    assert!(output.status.success(), "{output:?}");
    assert!(seen.contains("--bin check-macos "), "{seen}");
    assert!(seen.ends_with(end), "{seen}");
}

#[rstest]
#[case::prose(&["test", "prose"], "--bin source-checks ", " -- prose ")]
#[case::packages(&["ci", "packages"], "--bin source-checks ", " -- packages ")]
#[case::package_builds(&["prove", "packages"], "--bin source-checks ", " -- package-builds ")]
#[case::bounded_models(&["ci", "interleavings"], "--bin interleavings ", " -- --bounded ")]
#[case::models(&["prove", "interleavings"], "--bin interleavings ", " -- no-install=")]
fn a_step_runs_its_program(#[case] step: &[&str], #[case] program: &str, #[case] end: &str) {
    let (output, seen) = cargo_of_step(step);
    assert!(output.status.success(), "{output:?}");
    assert!(seen.contains(program) && seen.contains(end), "{seen}");
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
