//! Which vCPUs a pause waits for.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

use std::sync::mpsc;
use std::thread;

use fake_hvf::control;
use hvf_backend::Vm;

#[test]
fn a_pause_waits_for_those_that_remain() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let ended = vm.create_vcpu().unwrap();
    let (created, is_created) = mpsc::channel();
    let (parks, parked) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut vcpu = vm.create_vcpu().unwrap();
            created.send(()).unwrap();
            while !vcpu.is_pausing() {
                thread::yield_now();
            }
            parks.send(()).unwrap();
            vcpu.park();
        });
        is_created.recv().unwrap();
        drop(ended);
        let paused = vm.pause().unwrap();
        parked.try_recv().unwrap();
        drop(paused);
    });
}
