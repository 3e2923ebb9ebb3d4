//! `StoppedProcess`: stopping and resuming processes.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use page_reader::{MappingsError, PageReader};
use process_memory::{
    ProcessMaps, ProcessMemory, ProcessMemoryError, ProcessStopError, StoppedProcess,
};
use support::target::{
    CHILD, PATIENCE, ROLE_THREAD, SIGNALS, THREADS, Target, is_free, play_role, states, wait_until,
};
use test_machine::{assert_handles_no_signals, rounds};

/// Runs the role of a child process.
#[test]
fn role() {
    play_role();
}

#[test]
fn the_guard_stops_every_thread_until_it_is_dropped() {
    test_machine::needs!(Ptrace);
    let target = Target::that("counts");
    let stopped = target.stop();
    assert_eq!(stopped.pid(), target.pid());
    assert!(stopped.threads() > THREADS);
    target.assert_stopped();
    assert_handles_no_signals("tracer");
    // Dropped by another thread.
    thread::spawn(move || drop(stopped)).join().unwrap();
    target.assert_running();
    wait_until("the process runs freely", || {
        is_free(target.pid(), &['R', 'S'])
    });
}

#[test]
fn threads_created_during_the_stop_are_stopped() {
    test_machine::needs!(Ptrace);
    let target = Target::that("changes its threads");
    for _ in 0..rounds(10, 50) {
        let stopped = target.stop();
        target.assert_stopped();
        drop(stopped);
    }
    target.assert_running();
}

#[test]
fn a_process_that_execs_repeatedly_is_stopped() {
    test_machine::needs!(Ptrace);
    let target = Target::that("runs itself again");
    for _ in 0..rounds(10, 100) {
        let stopped = target.stop();
        target.assert_stopped();
        drop(stopped);
        thread::sleep(Duration::from_millis(1));
    }
    target.assert_running();
}

/// The thread that calls `exec` becomes the first thread, regardless of its role when it was first
/// traced.
#[test]
fn an_exec_while_threads_are_traced_is_stopped_in_time() {
    test_machine::needs!(Ptrace);
    for round in (0..30).step_by(rounds(10, 1)) {
        let target = Target::that("executes a program on request");
        target.counts.get(CHILD).store(1 + round * 100, SeqCst);
        let stopped = target.stop();
        target.assert_stopped();
        drop(stopped);
    }
}

#[test]
fn a_process_whose_first_thread_has_ended_is_stopped() {
    test_machine::needs!(Ptrace);
    let target = Target::that("has no first thread");
    wait_until("the first thread has ended", || {
        states(target.pid()).contains('Z')
    });
    // Stopped by the id of another thread.
    let thread = target.counts.get(ROLE_THREAD).load(SeqCst) as u32;
    assert_ne!(thread, target.pid());
    let stopped = StoppedProcess::stop(thread, Duration::MAX).unwrap();
    assert_eq!(stopped.pid(), target.pid());
    assert_eq!(stopped.threads(), THREADS + 1);
    target.assert_stopped();
    drop(stopped);
    target.assert_running();
}

#[test]
fn repeated_stops_lose_no_signal() {
    test_machine::needs!(Ptrace);
    let target = Target::that("counts");
    let signals = target.counts.get(SIGNALS);
    let signals_sent: u64 = rounds(300, 3000);
    let mut sent = 0;
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for sent in 1..=signals_sent {
                target.signal(libc::SIGRTMIN());
                // Fewer than the limit of pending signals.
                wait_until("signals arrive", || sent - signals.load(SeqCst) < 100);
            }
            signals_sent
        });
        while !sender.is_finished() {
            drop(target.stop());
        }
        sent = sender.join().unwrap();
    });
    wait_until("every signal arrived", || signals.load(SeqCst) == sent);
}

#[test]
fn a_signal_to_a_stopped_process_arrives_on_resume() {
    test_machine::needs!(Ptrace);
    let target = Target::that("counts");
    let stopped = target.stop();
    target.signal(libc::SIGRTMIN());
    target.assert_stopped();
    assert_eq!(target.counts.get(SIGNALS).load(SeqCst), 0);
    drop(stopped);
    wait_until("the signal arrives", || {
        target.counts.get(SIGNALS).load(SeqCst) == 1
    });
}

#[test]
fn a_process_stopped_by_sigstop_stays_stopped() {
    test_machine::needs!(Ptrace);
    let target = Target::that("counts");
    target.signal(libc::SIGSTOP);
    wait_until("the process stops", || is_free(target.pid(), &['T']));
    let before = target.counts.load();
    let stopped = target.stop();
    target.assert_stopped();
    drop(stopped);
    wait_until("the process is detached", || is_free(target.pid(), &['T']));
    assert_eq!(target.counts.load(), before);
    target.signal(libc::SIGCONT);
    target.assert_running();
}

/// A capture may be killed at any time, without leaving the guest stopped.
#[test]
fn killing_the_tracer_resumes_the_process() {
    test_machine::needs!(Ptrace);
    let mut stopper = Target::that("stops its child");
    let child = stopper.counts.get(CHILD);
    wait_until("the process is stopped", || child.load(SeqCst) != 0);
    let target = child.load(SeqCst) as u32;
    assert_eq!(states(target).trim_matches('t'), "");
    let before = stopper.counts.load();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(stopper.counts.load(), before);
    stopper.child.kill().unwrap();
    stopper.child.wait().unwrap();
    stopper.counts.wait_past(before);
    wait_until("the process runs freely", || is_free(target, &['R', 'S']));
    kill(Pid::from_raw(target as i32), Signal::SIGKILL).unwrap();
}

#[test]
fn a_process_killed_while_stopped_is_gone() {
    test_machine::needs!(Ptrace);
    let mut target = Target::that("counts");
    let stopped = target.stop();
    let maps = ProcessMaps::of(target.pid()).unwrap();
    let stack = maps.named("[stack]").unwrap();
    let range = (stack.addresses.start, stack.size());
    let memory = ProcessMemory::open(target.pid(), [range]).unwrap();
    memory.read_at(stack.size() - 1, &mut [0]).unwrap();
    target.signal(libc::SIGKILL);
    wait_until("the process has ended", || {
        states(target.pid()).trim_matches('Z').is_empty()
    });
    let error = memory.read_at(stack.size() - 1, &mut [0]).unwrap_err();
    let error: ProcessMemoryError = error.downcast().unwrap();
    assert!(matches!(error, ProcessMemoryError::Gone { .. }));
    let pid = target.pid();
    let gone = |error| matches!(error, MappingsError::Gone { pid: gone } if gone == pid);
    assert!(gone(ProcessMaps::of(pid).unwrap_err()));
    drop(stopped);
    let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
    assert!(matches!(error, ProcessStopError::Gone { .. }), "{error}");
    target.child.wait().unwrap();
    let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
    assert!(matches!(error, ProcessStopError::Gone { .. }), "{error}");
    assert!(gone(ProcessMaps::of(pid).unwrap_err()));
}
