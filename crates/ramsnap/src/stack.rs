//! A stack that is large enough for every verb.

use std::panic;
use std::thread::Builder;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// The size of the stack that systems give the first thread of a program.
const SIZE: usize = 8 << 20;

/// A first thread with a smaller limit of its stack (`ulimit -s`) does not run the verb. The kernel
/// ends a process whose stack is too small by a signal, without a message.
const ENOUGH: u64 = 2 << 20;

/// Runs `work` on this thread, or on another one with a larger stack if that of this one is limited
/// to less.
pub fn run<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let is_small = getrlimit(Resource::RLIMIT_STACK)
        .is_ok_and(|(most, _)| most != RLIM_INFINITY && most < ENOUGH);
    if !is_small {
        return work();
    }
    // The work is done here if a limit of memory permits no other stack.
    let mut work = Some(work);
    let ran = std::thread::scope(|scope| {
        let run = || work.take().map(|work| work());
        let thread = Builder::new().name("main".to_owned()).stack_size(SIZE);
        let joined = thread.spawn_scoped(scope, run).ok()?.join();
        joined.unwrap_or_else(|panicked| panic::resume_unwind(panicked))
    });
    match (ran, work) {
        (Some(done), _) => done,
        (None, Some(work)) => work(),
        (None, None) => unreachable!("the work was taken by the thread, which has returned"),
    }
}
