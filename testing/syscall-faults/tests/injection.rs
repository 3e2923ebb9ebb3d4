//! Runs `cargo xtask faults`: the requested fault occurs, mutants are detected, and no files are
//! left.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::io::Read;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use test_machine::needs;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_syscall-faults"));
    command.args(arguments);
    command
}

fn faults(arguments: &[&str]) -> (Output, String) {
    let output = command(arguments).output().expect("it runs");
    let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    let said = said.concat();
    (output, said)
}

#[rstest]
#[case::a_failure("full", "pwrite64#1:ENOSPC", "make room on the file system")]
#[case::made_again("full", "pwrite64#1:EINTR", "the result: ok")]
#[case::short("full", "pwrite64#1:short:5", "the result: ok")]
#[case::nothing_taken("replace", "pwrite64#2:short:0", "failed to write whole buffer")]
#[case::not_renamed("full", "renameat#1:EIO", "was not replaced")]
#[case::renamed_and_denied("full", "renameat#1:lost:EIO", "the result: ok")]
#[case::and_not_looked_at("full", "renameat#1:lost:EIO+1", "may have been replaced")]
#[case::made_and_denied("replace", "creat#1:lost:EIO", "cannot stage a file")]
#[case::linked_and_denied("no-clobber-link", "linkat#3:lost:EIO+1", "may have been replaced")]
#[case::replaced(
    "full",
    "fsync#2:EIO",
    "was replaced, but its directory could not be synced"
)]
#[case::killed("full", "fsync#1:kill", "SIGKILL")]
#[case::a_completion("by-io-uring", "completion#3:EIO", "failed at offset 0x20000")]
#[case::a_short_completion("by-io-uring", "completion#3:short:1", "the result: ok")]
#[case::a_thread("by-threads", "clone3#1:EAGAIN", "Resource temporarily unavailable")]
#[case::served_ram_that_cannot_be_read("serve", "pread64#40:EIO", "the result: ok")]
#[case::vmm_is_not_accepted("serve", "accept4#1:EMFILE", "Too many open files")]
#[case::vmm_is_killed("serve", "clone3#1:EAGAIN", "the result: failed")]
#[case::vmm_is_notified("serve-notify", "clone3#1:EAGAIN", "the result: failed")]
#[case::vmm_is_not_unregistered("serve-notify", "uffd#37:ENOMEM", "the result: failed")]
#[case::a_limit("packed", "limit:100001", "File too large")]
fn what_goes_wrong_is_what_was_asked_for(
    #[case] scenario: &str,
    #[case] fault: &str,
    #[case] expected: &str,
) {
    needs!(Ptrace);
    let (output, said) = faults(&["--only", scenario, "--fault", fault]);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("no violation"), "{said}");
    assert!(said.contains(expected), "{said}");
}

#[test]
fn a_disk_with_room_for_a_part_says_so() {
    needs!(Ptrace, Root);
    let (output, said) = faults(&["--only=full", "--fault=room:100000"]);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("failed at offset 0x18000"), "{said}");
}

#[test]
fn a_mutant_is_found_and_its_fault_can_be_repeated() {
    needs!(Ptrace);
    let (output, said) = faults(&["--only=report-not-replaced", "--sample=40", "--seed=1"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains(" 0 untrue"), "{said}");
    let (_, again) = said
        .split_once("  repeat with: cargo xtask ")
        .expect("a command");
    let again = again.lines().next().expect("a line").replace('\'', "");
    let again: Vec<_> = again.split(' ').skip(1).collect();
    let (output, once_more) = faults(&again);
    assert_eq!(output.status.code(), Some(1), "{once_more}");
    assert!(once_more.contains("untrue"), "{once_more}");
}

#[test]
fn zeros_in_place_of_data_are_found_in_a_vmm() {
    needs!(Ptrace, Userfaultfd);
    let (output, said) = faults(&["--only=zeros-for-errors", "--fault=pread64#40:EIO"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("torn: zeros in page"), "{said}");
}

#[test]
fn the_library_passes_and_the_control_too() {
    needs!(Ptrace);
    let (output, said) = faults(&["--only=replace,by-hand", "--sample=10", "--seed=1"]);
    assert!(output.status.success(), "{said}");
    let last = said.lines().last().expect("lines");
    let expected = " faults in 2 scenarios, 0 lost, 0 torn, 0 leaked, 0 untrue";
    assert!(last.ends_with(expected), "{said}");
}

#[rstest]
#[case(&["--only=replace", "--fault=fsync#99:EIO"], "the call was not made")]
#[case(&["--only=replace", "--fault=fsync#1:ENOTHING"], "not an error of any call")]
#[case(&["--fault=fsync#1:EIO"], "--fault takes one scenario")]
#[case(&["--only=nothing"], "--list lists the scenarios")]
fn what_can_not_be_done_is_refused(#[case] arguments: &[&str], #[case] expected: &str) {
    needs!(Ptrace);
    let (output, said) = faults(arguments);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains(expected), "{said}");
}

#[test]
fn interrupted_it_leaves_nothing_behind() {
    needs!(Ptrace);
    let dir = tempfile::tempdir().expect("a directory");
    let names = || std::fs::read_dir(dir.path()).expect("a directory").count();
    let mut faults = command(&[])
        .env("TMPDIR", dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    while names() == 0 {
        if let Some(status) = faults.try_wait().expect("a child") {
            let mut errors = String::new();
            let stderr = faults.stderr.as_mut().expect("piped");
            stderr.read_to_string(&mut errors).expect("text");
            panic!("it ended before it was interrupted, {status}: {errors}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    kill(Pid::from_raw(faults.id().cast_signed()), Signal::SIGINT).expect("it lives");
    let output = faults.wait_with_output().expect("it ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("interrupted"), "{errors}");
    assert_eq!(names(), 0);
}
