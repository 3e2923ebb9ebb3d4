//! Standard streams that are closed, or open in the wrong direction, when the tool starts.

mod support;

use std::process::Command;

use rstest::rstest;
use support::{Ended, RAMSNAP, Work};

/// Runs the tool by a shell that redirects its streams.
fn redirected(work: &Work, arguments: &str, redirection: &str) -> Ended {
    let script = format!("exec {RAMSNAP} {arguments} {redirection}");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).current_dir(work.path(""));
    Ended::of(&mut shell)
}

#[rstest]
fn a_verb_that_prints_to_no_stdout_does_nothing(
    #[values(
        "info full.mem",
        "verify full.mem",
        "map full.mem",
        "map full.mem -o out.svg",
        "dump ram -o out",
        "diff full.mem --ram ram",
        "diff full.mem d1.mem --ram ram -o out",
        "merge full.mem d1.mem -o out",
        "merge --in-place full.mem d1.mem",
        "convert full.mem -o out",
        "convert full.mem -o - --zstd",
        "restore full.mem -o out",
        "sweep .",
        "sweep --json --quiet .",
        "demo --keep out",
        "man out",
        "completions bash",
        "info full.mem --quiet",
        "diff full.mem --ram ram --quiet",
        "convert full.mem -o - --zstd --quiet",
        "--help",
        "--version",
        "help dump"
    )]
    arguments: &str,
    // The file is empty, and open for reading.
    #[values(">&-", "1<empty")] redirection: &str,
) {
    let work = Work::with_chain();
    work.create("empty", 0);
    let before = work.contents();
    redirected(&work, arguments, redirection).fails(3, &["stdout", "closed"]);
    assert!(work.contents() == before, "{:?}", work.files());
}

#[rstest]
#[case::dump("dump ram -o out --quiet")]
#[case::diff("diff full.mem d1.mem --ram ram -o out --quiet")]
#[case::merge("merge full.mem d1.mem -o out --quiet")]
#[case::convert("convert full.mem -o out --quiet")]
#[case::restore("restore full.mem -o out --quiet")]
fn a_quiet_verb_that_prints_nothing_needs_no_stdout(#[case] arguments: &str) {
    let work = Work::with_chain();
    redirected(&work, arguments, ">&-").good();
    assert!(work.path("out").exists());
}

#[rstest]
fn a_stream_from_no_stdin_is_refused(
    #[values("<&-", "0>written")] redirection: &str,
    #[values("-o out", "-o - --quiet")] output: &str,
) {
    let work = Work::with_chain();
    let convert = format!("convert - --zstd {output}");
    let ended = redirected(&work, &convert, redirection);
    ended.fails(3, &["stdin", "closed"]);
    assert!(!work.path("out").exists());
}

/// The exit code is what remains to report a result.
#[rstest]
#[case::success("verify full.mem", 0)]
#[case::check_failed("verify rotten.mem", 1)]
#[case::usage("dump ram", 2)]
#[case::exists("dump ram -o full.mem", 2)]
#[case::failure("info missing.mem", 3)]
#[case::saved("dump ram -o out", 0)]
fn without_stderr_the_exit_code_is_right(#[case] arguments: &str, #[case] code: i32) {
    let work = Work::with_chain();
    work.copy("full.mem", "rotten.mem");
    work.rot("rotten.mem", 5000);
    let closed = redirected(&work, arguments, "2>&-");
    assert_eq!(closed.code, Some(code), "{closed:?}");
    if work.path("out").exists() {
        // No message went to a file that got the descriptor of stderr.
        work.good("verify out");
        work.good("diff out --ram ram");
    }
}

/// A stdin that is not used may be closed.
#[test]
fn verbs_that_read_files_need_no_stdin() {
    let work = Work::with_chain();
    redirected(&work, "verify full.mem d1.mem", "<&-").good();
    redirected(&work, "dump ram -o out", "<&-").good();
    work.good("diff out --ram ram");
}
