//! Pausing a vCPU between any two instructions: a signal to its thread makes `KVM_RUN` return.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Interrupts a system call, and does nothing else.
const NUDGE: Signal = Signal::SIGUSR2;

/// Between two nudges. One alone may come just before the vCPU runs, and change nothing.
const AGAIN: Duration = Duration::from_micros(50);

/// Does `work` on this thread, which is nudged by signals from `after` on until `work` returns.
pub(super) fn nudged<T>(after: Duration, work: impl FnOnce() -> T) -> nix::Result<T> {
    extern "C" fn nothing(_: libc::c_int) {}
    // No SA_RESTART: the system call is to return.
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: a handler that does nothing is safe at any instruction.
    unsafe { sigaction(NUDGE, &action) }?;
    let worker = pthread_self();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let nudger = scope.spawn(|| {
            thread::sleep(after);
            while !done.load(Ordering::Acquire) {
                // The worker lives: the scope keeps it here.
                pthread_kill(worker, NUDGE)?;
                thread::sleep(AGAIN);
            }
            nix::Result::Ok(())
        });
        let result = work();
        done.store(true, Ordering::Release);
        // The nudger does not panic.
        nudger.join().unwrap_or(Ok(())).map(|()| result)
    })
}
