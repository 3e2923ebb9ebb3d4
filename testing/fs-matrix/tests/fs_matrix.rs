//! Runs the matrix with a deliberately broken library: the check that is named for the mutant
//! detects it.

use std::path::Path;
use std::process::{Command, Output};

use rstest::rstest;
use serde_json::Value;
use test_machine::needs;

fn matrix(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fs-matrix"))
        .args(arguments)
        .output()
        .expect("the matrix runs")
}

/// The names of the broken checks, and whether the command failed.
fn broken(dir: &Path, arguments: &[&str]) -> (Vec<String>, bool) {
    let json = dir.join("findings.json");
    let mount = format!("--mount=here={}", dir.display());
    let save = format!("--json={}", json.display());
    let output = matrix(&[&["--no-install", &mount, &save], arguments].concat());
    let text = std::fs::read_to_string(&json)
        .unwrap_or_else(|_| panic!("no findings: {}", String::from_utf8_lossy(&output.stderr)));
    let report: Value = serde_json::from_str(&text).expect("JSON");
    let findings = report["mounts"][0]["findings"]
        .as_array()
        .expect("findings");
    assert!(!findings.is_empty());
    let broken = findings
        .iter()
        .filter(|finding| finding["verdict"] == "broken")
        .map(|finding| finding["check"].as_str().expect("a name").to_owned());
    (broken.collect(), !output.status.success())
}

/// Unless tests are thorough, only these and `named` are run: checks of each family, but those that
/// run a child many times.
fn selection(named: &[&str]) -> Vec<String> {
    const QUICK: [&str; 4] = ["full dump", "diff", "chain applied", "replace"];
    if test_machine::thorough() {
        return Vec::new();
    }
    let names = QUICK.iter().chain(named);
    names.map(|name| format!("--check={name}")).collect()
}

#[rstest]
#[case::skips_the_file_sync("skip-file-sync", &["file synced before the rename"])]
#[case::follows_the_stages_symlink("follow-stage-symlink", &["symlink planted at the staged file's name"])]
#[case::ignores_the_bitmaps_page_size("ignore-bitmap-page-size", &[
    "diff from a coarser bitmap",
    "diff from a finer bitmap",
    "diff from a bitmap rebuilt coarser in between",
    "diff from a bitmap rebuilt finer in between",
    "partial last page",
])]
#[case::skips_partial_blocks("skip-partial-blocks", &[
    "written by io_uring",
    "written by threads",
    "written by positioned writes",
    "written by the automatic engine",
])]
fn each_mutant_is_caught_only_by_the_check_named_for_it(
    #[case] mutant: &str,
    #[case] caught_by: &[&str],
) {
    needs!(Strace);
    let dir = tempfile::tempdir().expect("a directory");
    let mut arguments = selection(caught_by);
    arguments.push(format!("--mutant={mutant}"));
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    assert_eq!(
        broken(dir.path(), &arguments),
        (caught_by.iter().map(ToString::to_string).collect(), true)
    );
}

#[test]
fn the_library_as_it_is_passes_on_any_directory() {
    let dir = tempfile::tempdir().expect("a directory");
    let arguments = selection(&["punching", "two writers", "file synced before the rename"]);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    assert_eq!(broken(dir.path(), &arguments), (Vec::new(), false));
}

#[test]
fn a_directory_that_is_not_there_is_no_pass() {
    let dir = tempfile::tempdir().expect("a directory");
    let json = dir.path().join("findings.json");
    let save = format!("--json={}", json.display());
    let output = matrix(&["--no-install", "--mount=gone=/nonexistent", &save]);
    assert!(!output.status.success());
    let text = std::fs::read_to_string(json).expect("the findings");
    let report: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["mounts"][0]["mount"], "gone");
    assert!(report["mounts"][0]["failed"].is_string(), "{report}");
}
