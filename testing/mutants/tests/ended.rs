//! A program that is ended ends what it started.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// In the place of cargo: it starts another process, as cargo does, and waits for it.
const CARGO: &str = "#!/bin/sh\nsleep 60 & echo ready; wait $!\n";

#[test]
fn models_that_are_ended_end_the_processes_below() {
    let dir = tempfile::tempdir().expect("a directory");
    let cargo = dir.path().join("cargo");
    fs::write(&cargo, CARGO).expect("written");
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).expect("executable");
    let path = std::env::var("PATH").expect("a path");
    let mut models = Command::new(env!("CARGO_BIN_EXE_interleavings"))
        .arg("--bounded")
        .env("PATH", format!("{}:{path}", dir.path().display()))
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let printed = BufReader::new(models.stdout.take().expect("piped")).lines();
    let mut printed = printed.map(|line| line.expect("text"));
    assert!(printed.any(|line| line == "ready"), "it begins");
    kill(Pid::from_raw(models.id().cast_signed()), Signal::SIGTERM).expect("it lives");
    // All processes below it have this pipe, too: it ends with the last of them.
    printed.for_each(drop);
    assert_eq!(models.wait().expect("it ends").code(), Some(1));
}
