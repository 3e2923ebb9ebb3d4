//! That the check for macOS finds what is wrong there and nowhere else.

use std::path::Path;
use std::process::{Command, Output};

use rstest::rstest;
use tempfile::TempDir;
use test_machine::REQUIRE;

/// What no other system compiles.
const FILE: &str = "src/sys/macos.rs";

/// `sparse-file` and what it takes of this workspace, to break.
fn copy_of_sparse_file() -> TempDir {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let copy = tempfile::tempdir().expect("a directory");
    let manifest = std::fs::read_to_string(here.join("Cargo.toml")).expect("the workspace's");
    let members = r#"members = ["crates/*", "xtask", "benches"]"#;
    assert!(
        manifest.contains(members),
        "the members are listed otherwise"
    );
    let manifest = manifest.replace(members, r#"members = ["crates/*"]"#);
    std::fs::write(copy.path().join("Cargo.toml"), manifest).expect("written");
    std::fs::copy(here.join("Cargo.lock"), copy.path().join("Cargo.lock")).expect("copied");
    for name in ["sparse-file", "test-machine", "dirty-bitmap", "page-reader"] {
        let crates = Path::new("crates").join(name);
        copy_dir(&here.join(&crates), &copy.path().join(&crates));
    }
    copy
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("a crate") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("copied");
        }
    }
}

fn check(copy: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["check-macos", "--no-install", "--manifest-path"])
        .arg(copy.join("crates/sparse-file/Cargo.toml"))
        .env("CARGO_TERM_COLOR", "never")
        .output()
        .expect("the check runs")
}

/// Whether this machine can check for macOS at all, said where it can't; a failure where it must.
fn checks_here(output: &Output, test: &str) -> bool {
    let said = String::from_utf8_lossy(&output.stdout);
    if !said.contains("NOT RUN") {
        return true;
    }
    let required = std::env::var(REQUIRE).is_ok_and(|needs| needs == "all");
    assert!(!required, "{test}: {said}");
    eprintln!("{test}: {said}");
    false
}

#[rstest]
#[case::a_name_that_macos_has_not("libc::F_PUNCHHOLE,", "libc::F_PUNCH_HOLE,", "error[E0425]")]
#[case::unsafe_code_without_its_reason(
    "    // SAFETY: F_NOCACHE takes",
    "    // F_NOCACHE takes",
    "error: unsafe block missing a safety comment"
)]
fn a_broken_line_for_macos_alone_fails_the_check_at_that_line(
    #[case] right: &str,
    #[case] wrong: &str,
    #[case] error: &str,
) {
    let copy = copy_of_sparse_file();
    let file = copy.path().join("crates/sparse-file").join(FILE);
    let source = std::fs::read_to_string(&file).expect("the source");
    let at = source.find(right).expect("the line to break");
    std::fs::write(&file, source.replacen(right, wrong, 1)).expect("written");

    let output = check(copy.path());
    if !checks_here(
        &output,
        "a_broken_line_for_macos_alone_fails_the_check_at_that_line",
    ) {
        return;
    }
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    let broken = source[..at].matches('\n').count() + 1;
    // Clippy points at the block below the comment.
    let place = |line: usize| format!("{FILE}:{line}:");
    assert!(
        said.contains(error)
            && [broken, broken + 1]
                .iter()
                .any(|line| said.contains(&place(*line))),
        "{error} at line {broken} was not said:\n{said}"
    );
}

#[test]
fn the_same_copy_unbroken_passes() {
    let copy = copy_of_sparse_file();
    let output = check(copy.path());
    if checks_here(&output, "the_same_copy_unbroken_passes") {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }
}
