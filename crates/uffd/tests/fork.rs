//! Forks as events. The only test of its program: a fork would wait for the descriptors of other
//! tests.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use support::{Memory, in_thread, load, next_event, next_fault, page_of, page_size, register};
use test_machine::needs;
use uffd::{Event, FaultFlags, Features, FillFlags, Modes, Stop, Userfaultfd};

/// Fills the same page with other bytes in a process and in its child.
#[test]
fn the_memory_of_a_forked_child_has_its_own_descriptor() {
    needs!(Userfaultfd, Root);
    let fault = Userfaultfd::options()
        .features(Features::EVENT_FORK)
        .open()
        .unwrap();
    let memory = Memory::private(2);
    register(&fault, memory.range(), Modes::MISSING);
    let address = memory.address(0);
    let forking = in_thread(move || {
        // SAFETY: the child only reads mapped memory and ends.
        match unsafe { fork() }.unwrap() {
            // SAFETY: ends the child at once.
            ForkResult::Child => unsafe { libc::_exit(load(address).into()) },
            ForkResult::Parent { child } => child,
        }
    });
    let child = match next_event(&fault) {
        Event::Fork { child } => child,
        other => panic!("{other:?}"),
    };
    assert_eq!(child.features(), Some(Features::EVENT_FORK));
    let process = forking.join().unwrap();
    assert_eq!(next_fault(&child), (address, FaultFlags::empty()));
    assert!(fault.read_event().unwrap().is_none());
    let fill = |fault: &Userfaultfd, byte| {
        let filled = fault.copy_bytes(address, &page_of(byte), FillFlags::empty());
        filled.complete()
    };
    assert_eq!(fill(&fault, 1), Ok(page_size()));
    assert_eq!(fill(&child, 2), Ok(page_size()));
    assert_eq!(waitpid(process, None), Ok(WaitStatus::Exited(process, 2)));
    assert_eq!(load(address), 1);
    let zeros = child.zeropage(memory.page(1), FillFlags::empty());
    assert_eq!(zeros.complete(), Err(Stop::Exited));
}
