//! Blocking signals for threads that handle guest memory.

#![allow(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;

/// Signals that a thread causes itself by an instruction or a system call. If one were blocked, the
/// kernel would end the process without calling its handler.
const OF_THE_THREAD: [libc::c_int; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGABRT,
];

/// Blocks all signals of the calling thread that come from elsewhere, until it is dropped. A thread
/// that is started meanwhile never handles them.
///
/// The handler of a signal runs on any thread of the process that does not block the signal. If the
/// handler accesses guest memory, it may wait for the thread that it has interrupted: the thread
/// that fills a missing page, or that unprotects one. So a library that starts threads blocks
/// signals first.
///
/// The signals that a thread causes itself (`SIGSEGV`, `SIGBUS`, `SIGFPE`, `SIGILL`, `SIGTRAP`,
/// `SIGSYS`, `SIGABRT`) are not blocked. Handlers of them, such as those that track writes, run as
/// before.
///
/// # Examples
/// ```
/// use host_memory::BlockedSignals;
///
/// let blocked = BlockedSignals::new();
/// let worker = std::thread::spawn(|| "no handler interrupts this thread");
/// drop(blocked); // signals that arrived meanwhile are handled by now
/// worker.join().unwrap();
/// ```
#[must_use = "signals are blocked until the value is dropped"]
pub struct BlockedSignals {
    before: libc::sigset_t,
    /// The mask belongs to the thread.
    of_this_thread: PhantomData<*const ()>,
}

impl BlockedSignals {
    /// Blocks the signals of the calling thread.
    #[expect(
        clippy::new_without_default,
        reason = "a default value should have no effect"
    )]
    pub fn new() -> Self {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigfillset` initializes the set, to which `sigdelset` has the only pointer. The
        // signals are valid.
        unsafe {
            libc::sigfillset(set.as_mut_ptr());
            for signal in OF_THE_THREAD {
                libc::sigdelset(set.as_mut_ptr(), signal);
            }
        }
        // SAFETY: the set is initialized. The call cannot fail for this argument, and initializes
        // the previous mask.
        let before = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
            before.assume_init()
        };
        Self {
            before,
            of_this_thread: PhantomData,
        }
    }
}

impl fmt::Debug for BlockedSignals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockedSignals").finish_non_exhaustive()
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the mask is initialized, and the thread is the one that blocked: the value cannot
        // be sent to another one.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked(signal: libc::c_int) -> bool {
        let mut now = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the call changes nothing and initializes the current mask.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), now.as_mut_ptr());
            libc::sigismember(now.as_ptr(), signal) == 1
        }
    }

    const SIGNALS: [libc::c_int; 5] = [
        libc::SIGALRM,
        libc::SIGUSR1,
        libc::SIGTERM,
        libc::SIGPROF,
        libc::SIGCHLD,
    ];

    #[test]
    fn threads_inherit_the_blocked_signals() {
        let before = SIGNALS.map(is_blocked);
        let blocked = BlockedSignals::new();
        let worker =
            std::thread::spawn(|| (SIGNALS.map(is_blocked), OF_THE_THREAD.map(is_blocked)));
        assert_eq!(SIGNALS.map(is_blocked), [true; 5]);
        drop(blocked);
        assert_eq!(worker.join().unwrap(), ([true; 5], [false; 7]));
        assert_eq!(SIGNALS.map(is_blocked), before);
    }

    #[test]
    fn signals_that_were_blocked_before_stay_blocked() {
        let outer = BlockedSignals::new();
        drop(BlockedSignals::new());
        assert_eq!(SIGNALS.map(is_blocked), [true; 5]);
        drop(outer);
    }
}
