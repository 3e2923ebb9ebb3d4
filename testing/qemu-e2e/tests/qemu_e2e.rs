//! `cargo xtask qemu-e2e` as its user meets it; that its proof can fail, it shows itself each time.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_machine::needs;

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qemu-e2e"));
    command.arg("--dir").arg(dir);
    command
}

/// The processes that work in a directory below `dir`, removed or not.
fn working_in(dir: &Path) -> usize {
    let dir = dir.canonicalize().expect("a directory");
    let processes = fs::read_dir("/proc").expect("processes");
    let places =
        processes.filter_map(|process| fs::read_link(process.ok()?.path().join("cwd")).ok());
    places.filter(|place| place.starts_with(&dir)).count()
}

#[test]
fn interrupted_it_leaves_no_file_and_no_qemu() {
    let name = "interrupted_it_leaves_no_file_and_no_qemu";
    if !test_machine::thorough() {
        return test_machine::not_run(name, "it downloads and boots a guest");
    }
    needs!(LinuxGuest);
    let dir = tempfile::tempdir().expect("a directory");
    let mut e2e = command(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let said = BufReader::new(e2e.stdout.take().expect("piped")).lines();
    let mut said = said.map(|line| line.expect("text"));
    assert!(
        said.any(|line| line.starts_with("guest: ")),
        "it runs a guest"
    );
    assert_eq!(working_in(dir.path()), 1, "QEMU");

    let pid = Pid::from_raw(e2e.id().cast_signed());
    kill(pid, Signal::SIGINT).expect("it lives");
    let mut errors = String::new();
    let stderr = e2e.stderr.as_mut().expect("piped");
    stderr.read_to_string(&mut errors).expect("text");
    assert_eq!(e2e.wait().expect("it ends").code(), Some(1));
    assert_eq!(errors, "error: interrupted\n");
    assert_eq!(working_in(dir.path()), 0);
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let output = command(Path::new("/nonexistent"))
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("can't make a directory in /nonexistent"),
        "{said}"
    );
}
