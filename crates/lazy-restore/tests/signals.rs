//! Signal handlers that access memory that is filled on demand.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::getpid;
use page_reader::PageReader;
use support::lazy_images::{MIB, PAGE, images, on_demand};
use support::open_chain;
use test_machine::{Need, is_alone};

/// The address of the memory, and the number of calls of the handler.
static MEMORY: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Touches another missing page at each call.
extern "C" fn touch(_: libc::c_int) {
    let call = CALLS.fetch_add(1, Ordering::Relaxed) as u64;
    let offset = (call % (4 * MIB / PAGE)) * PAGE;
    let address = MEMORY.load(Ordering::Relaxed) + offset as usize;
    let byte: *const u8 = std::ptr::with_exposed_provenance(address);
    // SAFETY: the memory is mapped until all signals were sent.
    unsafe { byte.read_volatile() };
}

/// Returns the ids of the threads with this name, once there is one.
fn threads_named(name: &str) -> Vec<libc::pid_t> {
    loop {
        let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let named = threads.filter(|thread| {
            let comm = std::fs::read_to_string(thread.path().join("comm"));
            comm.is_ok_and(|comm| comm.trim() == name)
        });
        let ids = named.map(|thread| thread.file_name().to_str().unwrap().parse().unwrap());
        let ids: Vec<_> = ids.collect();
        if !ids.is_empty() {
            return ids;
        }
        thread::yield_now();
    }
}

fn signal_thread(thread: libc::pid_t) {
    let signal = Signal::SIGUSR1 as libc::c_int;
    // SAFETY: the call accesses no memory.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, getpid().as_raw(), thread, signal) };
    Errno::result(sent).unwrap();
}

/// A handler on the fault handler's thread would wait for itself.
#[test]
fn handler_that_touches_a_missing_page_ends() {
    let test = "handler_that_touches_a_missing_page_ends";
    if !Need::Userfaultfd.met(test) || !is_alone(test) {
        return;
    }
    let (done, finished) = mpsc::channel();
    thread::spawn(move || {
        let images = images();
        let ram = on_demand().start(open_chain(&images)).unwrap();
        MEMORY.store(ram.as_ptr().expose_provenance(), Ordering::Relaxed);
        let handler = SigHandler::Handler(touch);
        let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler only accesses atomics and the memory.
        unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
        for thread in threads_named("lazy-ram-faults") {
            signal_thread(thread);
        }
        let last = ram.ram_size() - 1;
        ram.read_at(last, &mut [0]).unwrap();
        assert_eq!(CALLS.load(Ordering::Relaxed), 0, "the signal is pending");
        // On this thread, the handler is run at once.
        signal_thread(nix::unistd::gettid().as_raw());
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        ram.wait().unwrap();
        done.send(()).unwrap();
    });
    // The thread would never end, so the test cannot join it.
    finished.recv_timeout(Duration::from_secs(60)).unwrap();
}
