//! Models of every interleaving. Run them with `RUSTFLAGS="--cfg ramsnap_loom" cargo test -p
//! kvm-backend --lib --release interleavings`.

use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::*;

/// Tries all interleavings with `RAMSNAP_THOROUGH=1`, otherwise those with at most 3
/// preemptions.
fn model(model: impl Fn() + Send + Sync + 'static) {
    let thorough = std::env::var_os("RAMSNAP_THOROUGH").is_some_and(|value| value == "1");
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = (!thorough).then_some(3);
    builder.check(model);
}

struct Guest {
    vcpus: Arc<RunStates>,
    written: AtomicU64,
}

impl Guest {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            vcpus: Arc::new(RunStates::new()),
            written: AtomicU64::new(0),
        })
    }

    /// Writes memory as a vCPU in the guest does.
    fn write(&self) {
        let written = self.written.load(Ordering::Relaxed);
        self.written.store(written + 1, Ordering::Relaxed);
    }

    /// Checks the memory during a pause that is in progress, and ends the pause.
    fn check_and_resume(&self) {
        self.check_twice(|| ());
        self.vcpus.resume();
    }

    /// Does the same, and lets the other threads run as far as they can between the checks: a
    /// vCPU that does not wait for the end of the pause then writes.
    fn yield_check_and_resume(&self) {
        self.check_twice(thread::yield_now);
        self.vcpus.resume();
    }

    fn check_twice(&self, between: impl FnOnce()) {
        let written = self.written.load(Ordering::Relaxed);
        between();
        let still = self.written.load(Ordering::Relaxed);
        assert_eq!(still, written, "a vCPU wrote during the pause");
    }
}

#[test]
fn a_vcpu_against_two_pauses() {
    model(|| {
        let guest = Guest::new();
        let mut vcpu = guest.vcpus.add_new();
        let running = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                for _ in 0..2 {
                    let in_guest = vcpu.enter();
                    guest.write();
                    drop(in_guest);
                }
                assert!(vcpu.begin_completion());
                guest.write();
                vcpu.completed();
            }
        });
        for _ in 0..2 {
            if guest.vcpus.pause().is_ok() {
                guest.check_and_resume();
            }
        }
        running.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_waits_against_the_next_pause() {
    model(|| {
        let guest = Guest::new();
        let mut vcpu = guest.vcpus.add_new();
        guest.vcpus.pause().unwrap();
        let running = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                let in_guest = vcpu.enter();
                guest.write();
                drop(in_guest);
            }
        });
        guest.yield_check_and_resume();
        if guest.vcpus.pause().is_ok() {
            guest.yield_check_and_resume();
        }
        running.join().unwrap();
    });
}

#[test]
fn a_vcpu_adopted_during_a_pause() {
    model(|| {
        let guest = Guest::new();
        let _first = guest.vcpus.add_new();
        guest.vcpus.pause().unwrap();
        let mut vcpu = guest.vcpus.add_adopted();
        let completing = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                assert!(vcpu.begin_completion());
                guest.write();
                vcpu.completed();
            }
        });
        guest.yield_check_and_resume();
        completing.join().unwrap();
        guest.vcpus.pause().unwrap();
        assert_eq!(guest.written.load(Ordering::Relaxed), 1);
        guest.yield_check_and_resume();
    });
}
