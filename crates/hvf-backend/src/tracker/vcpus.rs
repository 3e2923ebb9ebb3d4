//! Mutual exclusion of running vCPUs and checkpoints of a stopped guest.

#[cfg(ramsnap_loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(ramsnap_loom)]
use loom::thread::yield_now;
#[cfg(not(ramsnap_loom))]
use std::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(ramsnap_loom))]
use std::thread::yield_now;

/// The bit that is set while a checkpoint excludes vCPUs. The bits below count the running vCPUs.
const CLOSED: u32 = 1 << 31;

/// A lock that either many running vCPUs or one checkpoint holds.
///
/// It is one word, which only read-modify-writes change. A checkpoint changes it from 0 to `CLOSED`
/// and back. A vCPU increments and decrements it while it is not closed. Thus each side either sees
/// the other or excludes it.
///
/// The effects of one side happen before the other side enters. The decrement of a vCPU releases,
/// and the exchange of the checkpoint acquires; the decrements in between are part of one release
/// sequence. The same applies to a checkpoint that is followed by a vCPU.
#[derive(Debug, Default)]
pub(super) struct Vcpus(AtomicU32);

/// A guard for a vCPU that is running or whose exit is being handled.
///
/// While it exists, a checkpoint of a stopped guest is refused.
#[derive(Debug)]
#[must_use = "the vCPU counts as running only while this guard exists"]
pub struct RunGuard<'a>(&'a Vcpus);

/// A guard that excludes running vCPUs.
pub(super) struct Stopped<'a>(&'a Vcpus);

impl Vcpus {
    /// Counts a vCPU as running. Waits while a checkpoint excludes vCPUs.
    ///
    /// If the thread already holds a [`RunGuard`], this never waits and may be called in a signal
    /// handler.
    pub(super) fn enter(&self) -> RunGuard<'_> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            if seen & CLOSED != 0 {
                // Protecting the dirty pages takes milliseconds. A vCPU only waits here if the VMM
                // resumed it too early.
                yield_now();
                seen = self.0.load(Ordering::Relaxed);
                continue;
            }
            assert!(seen + 1 < CLOSED, "too many running vCPUs: {seen}");
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            match self
                .0
                .compare_exchange_weak(seen, seen + 1, success, failure)
            {
                Ok(_) => return RunGuard(self),
                Err(now) => seen = now,
            }
        }
    }

    /// Excludes vCPUs if none is running, after waiting for another checkpoint to end.
    ///
    /// # Errors
    /// Returns the number of running vCPUs.
    pub(super) fn stop(&self) -> Result<Stopped<'_>, u32> {
        loop {
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            match self.0.compare_exchange(0, CLOSED, success, failure) {
                Ok(_) => return Ok(Stopped(self)),
                Err(CLOSED) => yield_now(),
                Err(running) => return Err(running),
            }
        }
    }
}

impl Drop for RunGuard<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn stop_fails_while_a_vcpu_is_running() {
        let vcpus = Vcpus::default();
        let first = vcpus.enter();
        let second = vcpus.enter();
        assert_eq!(vcpus.stop().err(), Some(2));
        drop(first);
        assert_eq!(vcpus.stop().err(), Some(1));
        drop(second);
        drop(vcpus.stop().ok().unwrap());
        drop(vcpus.enter());
    }

    #[test]
    fn running_vcpus_and_checkpoints_exclude_each_other() {
        const TURNS: u64 = 20_000;
        let vcpus = Vcpus::default();
        let inside = AtomicU64::new(0);
        let stops = std::thread::scope(|scope| {
            let vcpu = || {
                for _ in 0..TURNS {
                    let _running = vcpus.enter();
                    inside.fetch_add(1, Ordering::Relaxed);
                    std::hint::spin_loop();
                    inside.fetch_sub(1, Ordering::Relaxed);
                }
            };
            let running: Vec<_> = (0..4).map(|_| scope.spawn(vcpu)).collect();
            let mut stops = 0;
            while !(stops > 0 && running.iter().all(|vcpu| vcpu.is_finished())) {
                if let Ok(_stopped) = vcpus.stop() {
                    stops += 1;
                    for _ in 0..100 {
                        assert_eq!(inside.load(Ordering::Relaxed), 0);
                    }
                }
            }
            stops
        });
        assert!(stops > 0);
    }
}

/// Loom models. Run with `RUSTFLAGS="--cfg ramsnap_loom" cargo test -p ramsnap-hvf-backend --lib
/// --release interleavings`.
#[cfg(all(test, ramsnap_loom))]
mod interleavings {
    use std::sync::Arc;

    use loom::sync::atomic::AtomicU64;
    use loom::thread;

    use super::*;

    /// Tries all interleavings with `RAMSNAP_THOROUGH=1`, otherwise those with at most 2
    /// preemptions.
    fn model(model: impl Fn() + Send + Sync + 'static) {
        let thorough = std::env::var_os("RAMSNAP_THOROUGH").is_some_and(|value| value == "1");
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = (!thorough).then_some(2);
        builder.check(model);
    }

    /// A guest in which each side checks that the other side's value does not change while it holds
    /// the lock.
    #[derive(Default)]
    struct Guest {
        vcpus: Vcpus,
        written: AtomicU64,
        protected: AtomicU64,
    }

    impl Guest {
        fn vcpu(self: &Arc<Self>, value: u64) -> thread::JoinHandle<()> {
            let guest = Arc::clone(self);
            thread::spawn(move || {
                let _running = guest.vcpus.enter();
                let protected = guest.protected.load(Ordering::Relaxed);
                guest.written.store(value, Ordering::Relaxed);
                let still = guest.protected.load(Ordering::Relaxed);
                assert_eq!(
                    still, protected,
                    "a checkpoint ran during the turn of a vCPU"
                );
            })
        }

        fn checkpoint(&self, value: u64) {
            if let Ok(_stopped) = self.vcpus.stop() {
                let written = self.written.load(Ordering::Relaxed);
                self.protected.store(value, Ordering::Relaxed);
                let still = self.written.load(Ordering::Relaxed);
                assert_eq!(still, written, "a vCPU ran during a checkpoint");
            }
        }
    }

    #[test]
    fn a_vcpu_and_two_checkpoints_exclude_each_other() {
        model(|| {
            let guest = Arc::new(Guest::default());
            let vcpu = guest.vcpu(1);
            guest.checkpoint(1);
            guest.checkpoint(2);
            vcpu.join().unwrap();
        });
    }

    /// In this model at most one thread waits. Two threads that wait for a third would never end.
    #[test]
    fn checkpoints_of_two_threads_exclude_each_other() {
        model(|| {
            let guest = Arc::new(Guest::default());
            let add = |guest: &Guest| {
                let _stopped = guest.vcpus.stop().ok().expect("no vCPU is running");
                let protected = guest.protected.load(Ordering::Relaxed);
                guest.protected.store(protected + 1, Ordering::Relaxed);
            };
            let other = {
                let guest = Arc::clone(&guest);
                thread::spawn(move || add(&guest))
            };
            add(&guest);
            other.join().unwrap();
            let added = guest.protected.load(Ordering::Relaxed);
            assert_eq!(added, 2, "both checkpoints ran at the same time");
        });
    }
}
