//! Limits of memory: an output is refused before it is staged, and images before they are read.

#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use rstest::rstest;
use support::{Ended, PAGE, RAM, Work, noise};

/// Limits in MiB, from less than ramsnap needs to start to more than any verb needs.
const LIMITS: std::ops::Range<u64> = 8..120;

/// A chain with as many runs as possible.
fn scattered() -> Work {
    let work = Work::empty();
    let ram = work.create("ram", RAM);
    for page in (0..RAM / PAGE).step_by(2) {
        ram.write_all_at(&noise(page, PAGE), page * PAGE).unwrap();
    }
    work.good("dump ram -o full.mem");
    for page in (0..RAM / PAGE).step_by(8) {
        work.change(page, 1);
    }
    work.good("diff full.mem --ram ram -o d1.mem");
    let mut send = work.command("convert full.mem -o - --zstd");
    let sent = send.stdout(File::create(work.path("stream")).unwrap());
    assert!(sent.status().unwrap().success());
    work
}

/// Runs the tool with an address space of so many MiB.
fn limited(work: &Work, arguments: &str, mib: u64) -> Ended {
    let mut prlimit = Command::new("prlimit");
    prlimit
        .args([&format!("--as={}", mib << 20), "--core=0", support::RAMSNAP])
        .args(arguments.split(' '))
        .current_dir(work.path(""))
        .stdin(File::open(work.path("stream")).unwrap());
    Ended::of(&mut prlimit)
}

/// An allocation that fails later would end the process by SIGABRT, and leave the staged file.
#[rstest]
#[case::dump("dump ram -o out")]
#[case::sealed("dump ram -o out --layout sealed")]
#[case::diff("diff full.mem --ram ram -o out")]
#[case::merge("merge full.mem d1.mem -o out")]
#[case::in_place("merge --in-place full.mem d1.mem")]
#[case::convert("convert full.mem -o out --layout sealed")]
#[case::receive("convert - --zstd -o out")]
#[case::restore("restore full.mem d1.mem -o out")]
fn a_limit_of_memory_refuses_an_output_or_has_no_effect(#[case] arguments: &str) {
    let work = scattered();
    let before = work.contents();
    let full = work.read("full.mem");
    let (mut refused, mut done) = (0, 0);
    for mib in LIMITS.step_by(4) {
        let ended = limited(&work, arguments, mib);
        // Without the memory to start, or to load its libraries, it does nothing.
        let words = ["cannot allocate", "nothing was written"];
        match ended.code {
            Some(0) => {
                done += 1;
                if arguments.contains("--in-place") {
                    std::fs::write(work.path("full.mem"), &full).unwrap();
                } else {
                    std::fs::remove_file(work.path("out")).unwrap();
                }
            }
            _ if words.iter().all(|it| ended.err.contains(it)) => {
                assert_eq!(ended.code, Some(3), "{mib} MiB: {ended:?}");
                refused += 1;
            }
            _ => assert_eq!((refused, done), (0, 0), "{mib} MiB: {ended:?}"),
        }
        assert!(
            work.contents() == before,
            "{mib} MiB: {:?}: {ended:?}",
            work.files()
        );
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
}

/// An allocation that fails later would end the process by SIGABRT.
#[rstest]
#[case::verify("verify full.mem d1.mem")]
#[case::info("info full.mem d1.mem")]
#[case::map("map full.mem d1.mem")]
#[case::picture("map full.mem d1.mem -o map.svg --force")]
#[case::compare("diff full.mem d1.mem --ram ram")]
#[case::existing_ram("restore full.mem d1.mem -o target --force")]
fn a_limit_of_memory_is_an_error_or_has_no_effect(#[case] arguments: &str) {
    let work = scattered();
    work.create("target", RAM);
    let (mut refused, mut done) = (0, 0);
    for mib in LIMITS.step_by(2) {
        let ended = limited(&work, arguments, mib);
        match ended.code {
            Some(0) => done += 1,
            Some(3) if ended.err.contains("cannot allocate") => {
                let left = ["nothing was written", "the RAM is as it was"];
                assert!(left.iter().any(|it| ended.err.contains(it)), "{ended:?}");
                refused += 1;
            }
            _ => assert_eq!((refused, done), (0, 0), "{mib} MiB: {ended:?}"),
        }
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
}

/// The first thread of a program has this stack. An overflow ends it by a signal.
#[rstest]
#[case::dump("dump ram -o out")]
#[case::diff("diff full.mem --ram ram -o out")]
#[case::merge("merge full.mem d1.mem -o out --layout sealed")]
#[case::send("convert - --zstd -o out")]
#[case::restore("restore full.mem d1.mem -o out")]
#[case::verify("verify full.mem d1.mem")]
#[case::usage("--help")]
fn a_small_stack_has_no_effect(#[case] arguments: &str) {
    let work = scattered();
    let mut prlimit = Command::new("prlimit");
    prlimit
        .args(["--stack=131072", "--core=0", support::RAMSNAP])
        .args(arguments.split(' '))
        .current_dir(work.path(""))
        .stdin(File::open(work.path("stream")).unwrap());
    let ended = Ended::of(&mut prlimit);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}
