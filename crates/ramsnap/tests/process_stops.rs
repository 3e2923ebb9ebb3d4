//! When another process is stopped while its RAM is saved, and for how long.

#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::termios::{FlowArg, tcflow};
use nix::unistd::{Pid, mkfifo};
use process_memory::StoppedProcess;
use rstest::rstest;
use support::held::Held;
use support::vmm::{HANGS, Vmm};
use support::{RAM, Work};
use test_machine::needs;

/// Not a test: runs as the other process. See [`Vmm`].
#[test]
fn a_vmm() {
    support::vmm::run_as_vmm();
}

/// Runs the tool with its output on the terminal `to`, up to a system call.
fn held_on_terminal(work: &Work, arguments: &str, to: &impl AsFd, call: &str) -> Held {
    let to = nix::unistd::ttyname(to).unwrap();
    let script = format!(
        "exec {} {arguments} >{to} 2>{to}",
        support::RAMSNAP,
        to = to.display()
    );
    let mut command = Command::new("sh");
    command
        .args(["-c", &script])
        .env("TERM", "xterm")
        .current_dir(work.path(""));
    Held::before(&command, &(call.to_owned(), 1)).expect("held")
}

/// As with Ctrl-S, or a stalled ssh connection.
#[rstest]
#[case::dump("dump")]
#[case::diff("diff full.mem d1.mem")]
fn a_terminal_that_takes_no_output_keeps_no_process_stopped(#[case] verb: &str) {
    needs!(Ptrace, Strace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let terminal = openpty(None, None).unwrap();
    let command = format!("{verb} --pid {} --region guest-ram -o out", vmm.pid());
    // The staged file: warnings came before, and the process is stopped after it.
    let held = held_on_terminal(&work, &command, &terminal.slave, "renameat2");
    assert!(!vmm.is_stopped());
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    let mut held = held.let_go_on();
    held.wait_until_it_writes();
    assert!(!vmm.is_stopped());
    assert!(work.files().contains(&"out".to_owned()));
    // The first one cancels, as long as anything may be left to remove; the second one ends it.
    while !held.has_ended() {
        held.send(Signal::SIGTERM);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(held.release().0.code(), Some(143));
}

#[test]
fn a_second_signal_ends_a_capture_whose_terminal_is_stopped() {
    needs!(Ptrace, Strace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let terminal = openpty(None, None).unwrap();
    let command = format!("dump --pid {} --region guest-ram -o out", vmm.pid());
    let mut held = held_on_terminal(&work, &command, &terminal.slave, "pwrite64");
    assert!(vmm.is_stopped());
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    assert!(!held.signal(Signal::SIGTERM), "it cancels");
    assert!(held.signal(Signal::SIGTERM), "the second one ends it");
    assert_eq!(held.release().0.code(), Some(143));
    assert!(!vmm.is_stopped());
}

/// The process to stop may be the writer of the metadata.
#[rstest]
#[case::dump("dump")]
#[case::diff("diff full.mem d1.mem")]
fn the_process_runs_while_metadata_is_waited_for(#[case] verb: &str) {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    mkfifo(&work.path("fifo"), Mode::S_IRWXU).unwrap();
    let pid = vmm.pid();
    let mut child = work
        .command(&format!(
            "{verb} --pid {pid} --region guest-ram --metadata fifo -o out"
        ))
        .spawn()
        .unwrap();
    // Opens once the other end is open, and then waits for the bytes.
    let mut fifo = fs::File::options()
        .write(true)
        .open(work.path("fifo"))
        .unwrap();
    assert!(!vmm.is_stopped());
    fifo.write_all(b"vcpus").unwrap();
    drop(fifo);
    assert!(child.wait().unwrap().success());
    let info = work.good("info out --json").json();
    assert_eq!(info[0]["metadata_bytes"], 5, "{info}");
}

/// The test traces the process, so stopping it fails, which is the last possible error.
#[test]
fn all_that_can_fail_is_found_before_the_process_is_stopped() {
    needs!(Ptrace);
    let work = Work::with_chain();
    work.create("small", RAM / 2);
    work.good("dump small -o small.mem");
    let vmm = Vmm::with(&work, "ram");
    let stopped = StoppedProcess::stop(vmm.pid(), Duration::from_secs(120)).unwrap();
    let ram = format!("--pid {} --region guest-ram", vmm.pid());
    work.fails(&format!("dump {ram} -o none/out"), 3, &["none"]);
    work.fails(&format!("dump {ram} -o out --metadata none"), 3, &["none"]);
    let regions = format!("dump {ram} -o out --region-at 0:4MiB");
    work.fails(&regions, 2, &["4194304"]);
    work.fails(
        &format!("dump {ram} -o out --page-size 3GiB"),
        2,
        &["power"],
    );
    work.fails(
        &format!("dump {ram} -o out --page-size 16MiB"),
        2,
        &["16777216"],
    );
    work.fails(&format!("diff full.mem {ram} -o none/out"), 3, &["none"]);
    work.fails(
        &format!("diff full.mem {ram} -o out --metadata none"),
        3,
        &["none"],
    );
    work.fails(
        &format!("diff small.mem {ram} -o out"),
        2,
        &["bytes of RAM", "give --region"],
    );
    work.fails(&format!("dump {ram} -o out"), 3, &["already traced"]);
    drop(stopped);
    work.good(&format!("dump {ram} -o out"));
}

/// A suspended ramsnap would keep the guest stopped.
#[test]
fn ctrl_z_waits_until_the_process_runs_again() {
    needs!(Ptrace, Strace);
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let command = work.command(&format!(
        "dump --pid {} --region guest-ram -o out",
        vmm.pid()
    ));
    let held = Held::before(&command, &("pwrite64".to_owned(), 1)).expect("held");
    assert!(vmm.is_stopped());
    let blocked = held.blocked_by_all_threads();
    for signal in [Signal::SIGTSTP, Signal::SIGTTOU] {
        assert!(blocked >> (signal as u32 - 1) & 1 == 1, "{signal}");
    }
    held.send(Signal::SIGTSTP);
    let held = held.let_go_on();
    held.wait_until_suspended();
    assert!(!vmm.is_stopped());
    held.send(Signal::SIGCONT);
    assert_eq!(held.release().0.code(), Some(0));
    work.good("diff out --ram ram");
}

#[test]
fn a_signal_ends_the_wait_for_a_process_that_does_not_stop() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(HANGS, "1");
    });
    let before = work.files();
    let full = format!("dump --pid {} --region guest-ram -o out", vmm.pid());
    let mut child = work.command(&full).spawn().unwrap();
    // ramsnap tries to stop the process, which does not stop before the timeout.
    let status = format!("/proc/{}/status", vmm.pid());
    while fs::read_to_string(&status)
        .unwrap()
        .contains("TracerPid:\t0\n")
    {
        if let Some(status) = child.try_wait().unwrap() {
            assert_eq!(status.code(), Some(3));
            panic!("it gave up before it was seen to try");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    nix::sys::signal::kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGHUP).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(129));
    assert_eq!(work.files(), before);
}

#[test]
fn patience_limits_the_wait_for_a_process() {
    needs!(Ptrace);
    let work = Work::with_chain();
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(HANGS, "1");
    });
    let dump = format!("dump --pid {} --region guest-ram -o out", vmm.pid());
    let impatient = format!("{dump} --patience 50ms");
    work.fails(&impatient, 3, &["50ms", "--patience TIME"]);
}
