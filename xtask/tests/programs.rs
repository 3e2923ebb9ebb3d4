//! Tasks that are programs of their own: arguments, exit codes and signals pass through.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use nix::sys::signal::Signal;

/// Runs `cargo xtask ARGUMENTS` with `script` in the place of cargo.
fn xtask(script: &str, arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a directory");
    let cargo = dir.path().join("cargo");
    fs::write(&cargo, format!("#!/bin/sh\n{script}\n")).expect("written");
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).expect("executable");
    let path = std::env::var("PATH").expect("a path");
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(arguments)
        .env("PATH", format!("{}:{path}", dir.path().display()))
        .output()
        .expect("it runs")
}

/// Prints each argument on a line of its own.
const PRINT: &str = "printf '%s\\n' \"$@\"";

#[test]
fn arguments_reach_the_program_as_they_are() {
    let output = xtask(PRINT, &["fs-matrix", "--only", "ext4", "-h", "a b", "--"]);
    let printed = String::from_utf8_lossy(&output.stdout);
    let (cargo, program) = printed.split_once("\n--\n").expect("cargo's and others");
    assert!(cargo.starts_with("run\n"), "{cargo}");
    assert!(cargo.contains("--bin\nfs-matrix\n"), "{cargo}");
    assert_eq!(program, "--only\next4\n-h\na b\n--\n");
}

#[test]
fn help_of_a_task_is_the_help_of_its_program() {
    for arguments in [["demo", "--help"], ["help", "demo"], ["help", "mutants"]] {
        let output = xtask(PRINT, &arguments);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(printed.ends_with("\n--\n--help\n"), "{printed}");
    }
}

#[test]
fn the_exit_code_is_that_of_the_program() {
    let output = xtask("exit 7", &["demo"]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
}

#[test]
fn a_signal_that_ends_the_program_ends_the_task() {
    let output = xtask("kill -TERM $$", &["demo"]);
    assert_eq!(output.status.signal(), Some(Signal::SIGTERM as i32));
}
