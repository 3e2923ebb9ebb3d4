//! `cargo xtask soak` finds no violation, and finds each mutant.
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Command, Output};

use rstest::rstest;

fn soak(dir: &Path, arguments: &[&str]) -> (Output, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soak"));
    command.arg("--dir").arg(dir).args(arguments);
    let output = command.output().expect("it runs");
    let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    let said = said.concat();
    (output, said)
}

/// On a file system that has direct I/O, unlike some `/tmp`.
fn room() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

#[test]
fn a_few_rounds_find_nothing_and_leave_nothing() {
    let room = room();
    let (output, said) = soak(room.path(), &["--rounds=3", "--seed=1", "--guests=3"]);
    assert!(output.status.success(), "{said}");
    assert!(said.ends_with(", 0 lost, 0 torn\n"), "{said}");
    assert!(said.contains("\n9 rounds, "), "{said}");
    let left = std::fs::read_dir(room.path()).expect("it is there").count();
    assert_eq!(left, 0, "{said}");
}

#[test]
fn live_snapshots_find_nothing_and_leave_nothing() {
    let room = room();
    let (output, said) = soak(room.path(), &["--seed=1", "--only=3.0", "--rounds=12"]);
    assert!(output.status.success(), "{said}");
    let left = std::fs::read_dir(room.path()).expect("it is there").count();
    assert_eq!(left, 0, "{said}");
}

#[test]
fn served_ram_is_that_of_the_chain() {
    let room = room();
    let (output, said) = soak(room.path(), &["--seed=1", "--only=5.0", "--rounds=12"]);
    assert!(output.status.success(), "{said}");
    let left = std::fs::read_dir(room.path()).expect("it is there").count();
    assert_eq!(left, 0, "{said}");
}

#[test]
fn served_ram_without_the_newest_image_is_found() {
    if !test_machine::Need::Userfaultfd.met("served_ram_without_the_newest_image_is_found") {
        return;
    }
    let room = room();
    let of = ["--seed=1", "--only=5.0", "--rounds=12"];
    let of = [&of[..], &["--mutant=layer-missing"]].concat();
    let (output, said) = soak(room.path(), &of);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("a page is lost"), "{said}");
}

#[test]
fn image_of_another_point_in_time_is_found() {
    if !test_machine::Need::Userfaultfd.met("image_of_another_point_in_time_is_found") {
        return;
    }
    let room = room();
    let of = [
        "--seed=1",
        "--only=3.0",
        "--rounds=12",
        "--mutant=late-copy",
    ];
    let (output, said) = soak(room.path(), &of);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("a page is torn"), "{said}");
}

/// The seed makes each guest's plan the same: the violation shows within these rounds.
#[rstest]
#[case("mark-dropped", "a page is lost")]
#[case("page-flipped", "a page is torn")]
#[case("released-early", "a page is lost")]
fn a_mutant_is_found_named_and_found_again(#[case] mutant: &str, #[case] violation: &str) {
    let room = room();
    let flag = format!("--mutant={mutant}");
    let of = ["--rounds=48", &flag];
    let (output, said) = soak(
        room.path(),
        &[&["--seed=1", "--only=0.0"], &of[..]].concat(),
    );
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(violation), "{said}");
    let sum = said.lines().rfind(|line| line.contains(" rounds, "));
    assert!(
        sum.is_some_and(|sum| !sum.contains("0 lost, 0 torn")),
        "{said}"
    );
    let (_, files) = said.split_once("the files: ").expect("files are kept");
    let files = files.lines().next().expect("a path");
    assert!(Path::new(files).is_dir(), "{said}");

    let (_, again) = said
        .split_once("repeat with: cargo xtask soak ")
        .expect("a command");
    let (again, _) = again.split_once(": round").expect("a round");
    let again: Vec<_> = again.split(' ').chain(of).collect();
    let (output, again) = soak(room.path(), &again);
    assert_eq!(output.status.code(), Some(1), "{said}{again}");
    assert!(again.contains(violation), "{said}{again}");
}

#[test]
fn a_file_that_stays_open_is_missed() {
    let room = room();
    let of = ["--rounds=2", "--seed=1", "--guests=1", "--mutant=file-kept"];
    let (output, said) = soak(room.path(), &of);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: something leaks"), "{said}");
}
