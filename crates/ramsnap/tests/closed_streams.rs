//! Standard streams that are closed, open in the wrong direction, or a file of the verb when the
//! tool starts.

mod support;

#[cfg(target_os = "linux")]
use std::fs::File;
use std::process::Command;

use rstest::rstest;
use support::{Ended, RAMSNAP, Work};
#[cfg(target_os = "linux")]
use test_machine::needs;

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
        "list .",
        "compare full.mem full.mem",
        "cat full.mem --at 0",
        "metadata full.mem",
        "commit full.mem d1.mem",
        "rebase full.mem d1.mem d2.mem --onto full.mem",
        "compact . --keep 1",
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

/// The report or a message would be written into the file, and RAM or an image be damaged.
#[rstest]
#[case::info("info full.mem", "full.mem")]
#[case::verify("verify full.mem d1.mem", "d1.mem")]
#[case::map("map full.mem", "full.mem")]
#[case::map_drawn_of("map full.mem -o new.svg", "full.mem")]
#[case::map_drawn_to("map full.mem -o old.svg --force", "old.svg")]
#[case::dump_of("dump ram -o new", "ram")]
#[case::dump_to("dump ram -o first --force", "first")]
#[case::dump_with("dump ram -o new --metadata second", "second")]
#[case::diff_of("diff full.mem --ram ram -o new", "full.mem")]
#[case::diff_of_ram("diff full.mem --ram ram", "ram")]
#[case::diff_of_a_new_state("diff full.mem --to full.mem --to d1.mem", "d1.mem")]
#[case::diff_to("diff full.mem --ram ram -o first --force", "first")]
#[case::diff_with("diff full.mem --ram ram -o new --metadata second", "second")]
#[case::merge_of("merge full.mem d1.mem -o new", "d1.mem")]
#[case::merge_to("merge full.mem d1.mem -o first --force", "first")]
#[case::merge_in_place("merge --in-place full.mem d1.mem", "full.mem")]
#[case::convert_of("convert full.mem -o new", "full.mem")]
#[case::convert_to("convert full.mem -o first --force", "first")]
#[case::convert_with("convert full.mem -o new --metadata second", "second")]
#[case::convert_of_a_diff("convert raw:ram -o new --raw-diff --parent full.mem", "full.mem")]
#[case::convert_to_a_stream("convert full.mem -o - --zstd", "full.mem")]
#[case::restore_of("restore full.mem d1.mem -o new", "d1.mem")]
#[case::restore_to("restore full.mem -o first --force", "first")]
fn a_stream_that_is_a_file_of_the_verb_is_refused(#[case] arguments: &str, #[case] file: &str) {
    let work = Work::with_chain();
    work.create("old.svg", 0);
    std::fs::hard_link(work.path(file), work.path("link")).unwrap();
    let before = work.contents();
    for redirection in ["1<>", ">>"] {
        redirected(&work, arguments, &format!("{redirection}link"))
            .fails(2, &["stdout", file, "input or output"]);
    }
    for redirection in ["2<>", "2>>"] {
        let ended = redirected(&work, arguments, &format!("{redirection}link"));
        assert_eq!((ended.code, &ended.out[..]), (Some(2), ""), "{ended:?}");
        let both = format!("{redirection}link >>link");
        assert_eq!(redirected(&work, arguments, &both).code, Some(2));
    }
    assert!(work.contents() == before, "{:?}", work.files());
}

/// A stream to which nothing is written may be a file of the verb.
#[test]
fn a_stream_that_is_not_written_to_may_be_an_input() {
    let work = Work::with_chain();
    let before = work.read("full.mem");
    redirected(&work, "convert full.mem -o new --quiet", ">>full.mem").good();
    redirected(&work, "verify full.mem", "2<full.mem").good();
    assert!(work.read("full.mem") == before);
}

#[cfg(target_os = "linux")]
#[test]
fn ram_is_restored_to_a_quiet_stdout() {
    let work = Work::with_chain();
    let ram = work.create("new", support::RAM);
    let before = work.contents();
    redirected(&work, "restore full.mem -o /dev/stdout", "1<>new").fails(2, &["/dev/stdout"]);
    assert!(work.contents() == before);
    redirected(&work, "restore full.mem -o /dev/stdout --quiet", "1<>new").good();
    work.assert_same("new", "first");
    drop(ram);
}

/// The received image is opened again by its descriptor.
#[cfg(target_os = "linux")]
#[test]
fn a_missing_proc_is_an_error_before_the_stream_is_read() {
    needs!(Root);
    let work = Work::with_chain();
    let mut send = work.command("convert full.mem -o - --zstd");
    let sent = send.stdout(File::create(work.path("stream")).unwrap());
    assert!(sent.status().unwrap().success());
    let script = format!(
        "mount -t tmpfs none /proc && {{ {RAMSNAP} convert - --zstd -o out; echo \"status $?\"; \
         wc -c; }} < stream"
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]);
    let output = command.current_dir(work.path("")).output().unwrap();
    let (out, error) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    let unread = work.read("stream").len();
    assert_eq!(out, format!("status 3\n{unread}\n"), "{error}");
    for words in ["/proc", "mount it", "nothing was read"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(!work.path("out").exists());
}
