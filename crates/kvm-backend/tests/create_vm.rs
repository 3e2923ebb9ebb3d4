//! Creation of virtual machines while signals interrupt the call.
#![cfg(target_os = "linux")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use test_machine::needs;

/// Threads, each with its own stack mapping. KVM locks all mappings, and a signal can interrupt it
/// while it does: more mappings take longer.
const SLEEPERS: usize = 300;
/// The number of virtual machines to create. Without retries each creation fails.
const CREATED: usize = 30;

#[test]
fn create_vm_retries_when_a_signal_interrupts_it() {
    needs!(Kvm);
    let kvm = kvm_backend::open_kvm().unwrap();
    let came = Arc::new(AtomicUsize::new(0));
    signal_hook::flag::register_usize(Signal::SIGUSR2 as i32, Arc::clone(&came), 1).unwrap();
    let creator = pthread_self();
    let done = AtomicBool::new(false);
    let created = thread::scope(|scope| {
        let sleeper = || {
            while !done.load(Ordering::Acquire) {
                thread::park();
            }
        };
        let sleepers: Vec<_> = (0..SLEEPERS).map(|_| scope.spawn(sleeper)).collect();
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                // The creator exists: it waits for the end of the scope.
                pthread_kill(creator, Signal::SIGUSR2).unwrap();
                thread::yield_now();
            }
        });
        // From here on signals arrive during each creation.
        while came.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let created: Result<Vec<_>, _> =
            (0..CREATED).map(|_| kvm_backend::create_vm(&kvm)).collect();
        done.store(true, Ordering::Release);
        sleepers
            .iter()
            .for_each(|sleeper| sleeper.thread().unpark());
        created
    });
    assert_eq!(created.unwrap().len(), CREATED);
    assert_eq!(came.load(Ordering::Relaxed), 1);
}
