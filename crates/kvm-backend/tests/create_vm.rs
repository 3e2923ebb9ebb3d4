//! A virtual machine is created whatever interrupts the call.
#![cfg(target_os = "linux")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use test_machine::Need;

/// Each has mappings of its own. The more there are, the longer may KVM be interrupted while it locks them all.
const SLEEPERS: usize = 300;
/// Where nobody asks again, each of them fails.
const CREATED: usize = 30;

#[test]
fn a_thread_that_signals_come_to_creates_virtual_machines() {
    if !Need::Kvm.met("a_thread_that_signals_come_to_creates_virtual_machines") {
        return;
    }
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
                // The creator lives: the scope keeps it here.
                pthread_kill(creator, Signal::SIGUSR2).unwrap();
                thread::yield_now();
            }
        });
        // From here on: each creation is among signals.
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
