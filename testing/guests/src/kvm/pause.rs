//! Pauses a vCPU between any two instructions: a signal to its thread makes `KVM_RUN` return.

#![allow(unsafe_code)]

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The signal, which only interrupts a system call.
const INTERRUPT: Signal = Signal::SIGUSR2;

/// The interval between two signals. A single one may arrive just before the vCPU runs, without
/// effect.
const INTERVAL: Duration = Duration::from_micros(50);

/// Makes the signal interrupt system calls in any thread of this process, without other effect.
pub(super) fn handle_interrupts() -> nix::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // No SA_RESTART: the system call must return.
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: a handler that does nothing is safe at any instruction.
    unsafe { sigaction(INTERRUPT, &action) }.map(drop)
}

/// Interrupts a thread that was not joined.
pub(super) fn interrupt<T>(thread: &JoinHandle<T>) -> nix::Result<()> {
    pthread_kill(thread.as_pthread_t(), INTERRUPT)
}

/// Calls `work` on this thread, and interrupts the thread with signals from `after` on until `work`
/// returns.
pub(super) fn interrupted<T>(after: Duration, work: impl FnOnce() -> T) -> nix::Result<T> {
    handle_interrupts()?;
    let worker = pthread_self();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let interrupter = scope.spawn(|| {
            thread::sleep(after);
            while !done.load(Ordering::Acquire) {
                // The worker exists: it waits for the end of the scope.
                pthread_kill(worker, INTERRUPT)?;
                thread::sleep(INTERVAL);
            }
            nix::Result::Ok(())
        });
        let result = work();
        done.store(true, Ordering::Release);
        // The interrupting thread does not panic.
        interrupter.join().unwrap_or(Ok(())).map(|()| result)
    })
}
