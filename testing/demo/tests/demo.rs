//! `cargo xtask demo` as its user meets it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use test_machine::needs;

/// The command line, with a small guest that every machine has; files go to `dir`.
fn command(dir: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command
        .args(["--guest", "mprotect", "--ram", "8M"])
        .args(["--rounds", "2", "--steps", "300", "--dir"])
        .arg(dir)
        .args(more);
    command
}

fn demo(dir: &Path, more: &[&str]) -> Output {
    command(dir, more).output().unwrap()
}

fn lines(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    text.lines().map(str::to_owned).collect()
}

#[test]
fn the_first_line_names_the_guest_and_the_last_says_verified() {
    let dir = tempfile::tempdir().unwrap();
    let output = demo(dir.path(), &[]);
    let said = lines(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        said[0],
        "guest: this process, tracked by mprotect and its signal, 8.00 MiB of RAM (as requested)"
    );
    assert!(said.last().unwrap().starts_with("verified: 8.00 MiB"));
    for name in ["full", "diff 1", "diff 2"] {
        // Once in the table, once in the picture.
        let rows = said.iter().filter(|line| line.contains(name));
        assert!(rows.count() >= 2, "{name} in {said:#?}");
    }
    assert!(
        output.stderr.is_empty(),
        "no progress bar without a terminal: {output:?}"
    );
}

#[test]
fn closed_output_pipe_does_not_end_the_demo() {
    let dir = tempfile::tempdir().unwrap();
    let mut demo = command(dir.path(), &[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let mut reader = BufReader::new(demo.stdout.take().unwrap());
    reader.read_line(&mut first).unwrap();
    assert!(first.starts_with("guest: "), "{first}");
    drop(reader);
    let output = demo.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}

#[test]
fn without_being_asked_the_first_line_says_why_this_guest() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_demo"))
        .args(["--ram", "8M", "--rounds", "1", "--steps", "100", "--dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let first = &lines(&output.stdout)[0];
    let reasons = [
        "(the best available on this machine)",
        "(others are not available: ",
    ];
    assert!(
        reasons.iter().any(|reason| first.contains(reason)),
        "{first}"
    );
}

#[test]
fn live_demo_shows_each_pause_and_verifies_each_image() {
    needs!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_demo"))
        .args(["--live", "--ram", "16M", "--dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = lines(&output.stdout);
    assert!(said[0].starts_with("guest: a KVM virtual machine with 2 vCPUs and 16.00 MiB"));
    for method in ["stop-and-copy", "pre-copy", "copy-on-write"] {
        let chart = format!("{method} (pause ");
        assert!(
            said.iter().any(|line| line.starts_with(&chart)),
            "{said:#?}"
        );
    }
    assert!(
        said.last()
            .unwrap()
            .starts_with("verified: the images of 3 methods")
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn snapshots_are_removed_unless_kept() {
    let dir = tempfile::tempdir().unwrap();
    assert!(demo(dir.path(), &[]).status.success());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    assert!(demo(dir.path(), &["--keep"]).status.success());
    let kept = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
    let files = fs::read_dir(kept.path()).unwrap();
    let mut files: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
    files.sort();
    let expected = [
        "diff-1.mem",
        "diff-1.vcpu",
        "diff-2.mem",
        "diff-2.vcpu",
        "full.mem",
        "full.vcpu",
    ];
    assert_eq!(files, expected);
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_demo"))
        .args(["--guest", "mprotect", "--ram", "8M"])
        .args(["--rounds", "1000000", "--steps", "300", "--dir"])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let files = || {
        let snapshots = fs::read_dir(dir.path()).unwrap().next()?.unwrap().path();
        Some(fs::read_dir(snapshots).ok()?.count())
    };
    while files().is_none_or(|files| files < 4) {
        assert!(demo.try_wait().unwrap().is_none(), "it goes on for hours");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = Pid::from_raw(demo.id().cast_signed());
    kill(pid, Signal::SIGINT).unwrap();
    let output = demo.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(lines(&output.stderr), ["error: interrupted"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[rstest]
#[case::too_little_ram(&["--ram", "1M"], "at least 4.00 MiB")]
#[case::part_of_a_page(&["--ram", "8388609"], "not a multiple of 64.00 KiB")]
#[case::no_number(&["--ram", "much"], "write 256M or 4G")]
#[case::no_steps(&["--steps", "0"], "0 is not in")]
#[case::live_with_rounds(&["--live", "--rounds", "2"], "cannot be used with")]
#[case::an_unknown_guest(&["--guest", "xen"], "possible values: kvm, hvf, userfaultfd, mprotect")]
fn a_bad_argument_is_named(#[case] arguments: &[&str], #[case] why: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_demo"))
        .args(arguments)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = lines(&output.stderr).join("\n");
    assert!(said.contains(why), "{said}");
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error_and_exit_code_1() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let output = demo(&file.join("under"), &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = lines(&output.stderr).join("\n");
    assert!(said.starts_with("error: can't make"), "{said}");
}
