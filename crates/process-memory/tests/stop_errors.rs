//! `StoppedProcess`: processes that cannot be stopped.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use page_reader::MappingsError;
use process_memory::{CancelToken, ProcessMaps, ProcessStopError, StoppedProcess, Unresponsive};
use support::target::{
    CHILD, PATIENCE, ROLE_THREAD, THREADS, Target, is_free, play_role, states, wait_until,
};

/// Runs the role of a child process.
#[test]
fn role() {
    play_role();
}

#[test]
fn a_traced_process_is_refused_and_keeps_its_tracer() {
    test_machine::needs!(Ptrace);
    let target = Target::that("counts");
    let stopped = target.stop();
    let error = StoppedProcess::stop(target.pid(), PATIENCE).unwrap_err();
    let status = fs::read_to_string(format!("/proc/{}/status", target.pid())).unwrap();
    match error {
        ProcessStopError::Traced { tracer, .. } => {
            assert!(status.contains(&format!("TracerPid:\t{tracer}\n")));
        }
        other => panic!("{other}"),
    }
    target.assert_stopped();
    drop(stopped);
    target.assert_running();
    drop(target.stop());
}

#[test]
fn an_unresponsive_thread_is_named_and_the_process_runs() {
    test_machine::needs!(Ptrace);
    let target = Target::that("waits for a child to run a program");
    wait_until("the child exists", || {
        target.counts.get(CHILD).load(SeqCst) != 0
    });
    let within = Duration::from_millis(100);
    let role = target.counts.get(ROLE_THREAD).load(SeqCst);
    let wait_for_detach = || {
        wait_until("the process is detached", || {
            is_free(target.pid(), &['R', 'S', 'D'])
        })
    };
    // A thread that waits for a processor may be named as well.
    wait_until("the unresponsive thread is named", || {
        let start = Instant::now();
        let error = StoppedProcess::stop(target.pid(), within).unwrap_err();
        assert!(start.elapsed() >= within);
        wait_for_detach();
        match error {
            ProcessStopError::Unresponsive { thread, reason, .. } => {
                u64::from(thread) == role && reason == Unresponsive::Vfork
            }
            other => panic!("{other}"),
        }
    });
    target.assert_running();
}

/// A thread that does not stop does not block the others between attempts.
#[test]
fn an_unresponsive_process_runs_between_attempts() {
    test_machine::needs!(Ptrace);
    let target = Target::that("waits for a child to run a program");
    let child = target.counts.get(CHILD);
    wait_until("the child exists", || child.load(SeqCst) != 0);
    thread::scope(|scope| {
        let stop = scope.spawn(|| StoppedProcess::stop(target.pid(), PATIENCE * 2));
        for _ in 0..3 {
            wait_until("all but one thread are stopped", || {
                states(target.pid()).matches('t').count() > THREADS
            });
            target.assert_running();
        }
        // From now on all threads can stop.
        let child = Pid::from_raw(child.load(SeqCst) as i32);
        kill(child, Signal::SIGKILL).unwrap();
        drop(stop.join().unwrap().unwrap());
    });
    target.assert_running();
}

#[test]
fn a_cancelled_stop_leaves_the_process_running() {
    test_machine::needs!(Ptrace);
    let target = Target::that("waits for a child to run a program");
    let child = target.counts.get(CHILD);
    wait_until("the child exists", || child.load(SeqCst) != 0);
    let cancel = CancelToken::new();
    let error = thread::scope(|scope| {
        let stop =
            scope.spawn(|| StoppedProcess::stop_unless(target.pid(), Duration::MAX, &cancel));
        let guard = cancel.clone().drop_guard();
        wait_until("a thread is stopped", || states(target.pid()).contains('t'));
        drop(guard);
        stop.join().unwrap().unwrap_err()
    });
    assert!(
        matches!(error, ProcessStopError::Cancelled { .. }),
        "{error}"
    );
    wait_until("the process runs freely", || {
        is_free(target.pid(), &['R', 'S', 'D'])
    });
    target.assert_running();
}

#[test]
fn stopping_the_calling_process_is_refused() {
    let error = StoppedProcess::stop(std::process::id(), PATIENCE).unwrap_err();
    assert!(
        matches!(error, ProcessStopError::CurrentProcess { .. }),
        "{error}"
    );
}

#[test]
fn a_nonexistent_process_is_gone() {
    for pid in [0, 1 << 30, u32::MAX] {
        let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
        assert!(matches!(error, ProcessStopError::Gone { .. }), "{error}");
        let error = ProcessMaps::of(pid).unwrap_err();
        assert!(matches!(error, MappingsError::Gone { .. }), "{error}");
    }
}

/// The test runs itself as another user.
#[test]
fn a_process_of_another_user_is_refused_with_a_remedy() {
    const NAME: &str = "a_process_of_another_user_is_refused_with_a_remedy";
    const INSIDE: &str = "PROCESS_MEMORY_TEST_FOREIGN_PROCESS";
    if let Ok(pid) = std::env::var(INSIDE) {
        let pid = pid.parse().unwrap();
        let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
        assert!(
            matches!(error, ProcessStopError::NotPermitted { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("CAP_SYS_PTRACE"), "{error}");
        let error = ProcessMaps::of(pid).unwrap_err();
        assert!(matches!(error, MappingsError::Read { .. }), "{error}");
        return;
    }
    test_machine::needs!(Root);
    let target = Target::that("counts");
    let program = test_memory::world_executable();
    let output = Command::new(program.path())
        .args(["--exact", NAME])
        .env(INSIDE, target.pid().to_string())
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("1 passed"), "{output:?}");
    target.assert_running();
}
