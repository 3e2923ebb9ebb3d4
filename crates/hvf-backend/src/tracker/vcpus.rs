//! Who is in the guest: many vCPUs, or one checkpoint.

#[cfg(memsnap_loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(memsnap_loom)]
use loom::thread::yield_now;
#[cfg(not(memsnap_loom))]
use std::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(memsnap_loom))]
use std::thread::yield_now;

/// Set while a checkpoint keeps vCPUs out; the bits below count those that are in.
const CLOSED: u32 = 1 << 31;

/// One word, changed by read-modify-writes only: from 0 to `CLOSED` and back by a checkpoint, up and down by one by vCPUs while it is not
/// closed. So each sees the other or keeps it out, and what one did before it left happened before the other came in: a decrement releases, the
/// checkpoint's exchange acquires, and the decrements between are of one release sequence; the same the other way round.
#[derive(Debug, Default)]
pub(super) struct Vcpus(AtomicU32);

/// A vCPU that is in the guest, or whose exit is being handled; until dropped, there is no checkpoint of a stopped guest.
#[derive(Debug)]
#[must_use = "the vCPU is in the guest as long as this lives"]
pub struct InGuest<'a>(&'a Vcpus);

/// No vCPU is in the guest, and none comes in.
pub(super) struct Stopped<'a>(&'a Vcpus);

impl Vcpus {
    /// Waits while a checkpoint keeps vCPUs out. Lock-free otherwise: it can be called in a signal handler of a thread that is in already.
    pub(super) fn enter(&self) -> InGuest<'_> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            if seen & CLOSED != 0 {
                // For as long as it takes to protect what is dirty: milliseconds, and only if a monitor lets a vCPU go too early.
                yield_now();
                seen = self.0.load(Ordering::Relaxed);
                continue;
            }
            assert!(seen + 1 < CLOSED, "two billion vCPUs in one guest");
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            match self
                .0
                .compare_exchange_weak(seen, seen + 1, success, failure)
            {
                Ok(_) => return InGuest(self),
                Err(now) => seen = now,
            }
        }
    }

    /// Keeps vCPUs out, if none is in. Waits for another checkpoint to end; if vCPUs are in, says how many.
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

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
    }
}

#[cfg(all(test, not(memsnap_loom)))]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_guest_with_a_vcpu_in_it_is_not_stopped() {
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
    fn a_vcpu_and_a_checkpoint_are_never_in_at_once() {
        const TURNS: u64 = 20_000;
        let vcpus = Vcpus::default();
        let inside = AtomicU64::new(0);
        let stops = std::thread::scope(|scope| {
            let vcpu = || {
                for _ in 0..TURNS {
                    let _in_guest = vcpus.enter();
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

/// Every interleaving, under `RUSTFLAGS="--cfg memsnap_loom" cargo test -p hvf-backend --lib --release interleavings`.
#[cfg(all(test, memsnap_loom))]
mod interleavings {
    use std::sync::Arc;

    use loom::sync::atomic::AtomicU64;
    use loom::thread;

    use super::*;

    /// Tries all interleavings with `MEMSNAP_THOROUGH=1`, otherwise those with at most 2
    /// preemptions.
    fn model(model: impl Fn() + Send + Sync + 'static) {
        let thorough = std::env::var_os("MEMSNAP_THOROUGH").is_some_and(|value| value == "1");
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = (!thorough).then_some(2);
        builder.check(model);
    }

    /// What one side must see from its first look to its last as the other left it.
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
                let _in_guest = guest.vcpus.enter();
                let protected = guest.protected.load(Ordering::Relaxed);
                guest.written.store(value, Ordering::Relaxed);
                let still = guest.protected.load(Ordering::Relaxed);
                assert_eq!(still, protected, "a checkpoint comes between");
            })
        }

        fn checkpoint(&self, value: u64) {
            if let Ok(_stopped) = self.vcpus.stop() {
                let written = self.written.load(Ordering::Relaxed);
                self.protected.store(value, Ordering::Relaxed);
                let still = self.written.load(Ordering::Relaxed);
                assert_eq!(still, written, "a vCPU comes between");
            }
        }
    }

    #[test]
    fn a_vcpu_against_two_checkpoints() {
        model(|| {
            let guest = Arc::new(Guest::default());
            let vcpu = guest.vcpu(1);
            guest.checkpoint(1);
            guest.checkpoint(2);
            vcpu.join().unwrap();
        });
    }

    /// Two threads that wait for a third never end in a model: here one waits at most.
    #[test]
    fn checkpoints_of_two_threads() {
        model(|| {
            let guest = Arc::new(Guest::default());
            let add = |guest: &Guest| {
                let _stopped = guest.vcpus.stop().ok().expect("no vCPU is there");
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
            assert_eq!(added, 2, "two checkpoints at once");
        });
    }
}
