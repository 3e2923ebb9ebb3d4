//! The state of each vCPU, and the pause that keeps all of them out of the guest.

#[cfg(not(ramsnap_loom))]
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError};
#[cfg(not(ramsnap_loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(ramsnap_loom)]
use loom::sync::atomic::{AtomicU8, Ordering};
#[cfg(ramsnap_loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};

use super::pause_error::PauseError;

/// The vCPU is not in the guest, and KVM has nothing to complete.
const IDLE: u8 = 0;
/// `KVM_RUN` is under way.
const RUNNING: u8 = 1;
/// `KVM_RUN` has returned. KVM may have to complete the instruction of the exit.
const PENDING: u8 = 2;
/// The vCPU was adopted: it may be pending, and it may have been adopted during a pause.
const ADOPTED: u8 = 3;

/// The states of a set of vCPUs.
///
/// # Protocol
/// Only the vCPU itself changes its state. A state that permits a pause, [`IDLE`], is left with the
/// lock held and while nothing is paused. [`ADOPTED`] is left in the same way, as a vCPU may be
/// adopted during a pause. All other changes need no lock: before and after them the state forbids
/// a pause.
///
/// A pause holds the lock and loads each state once. Every vCPU found idle stays idle until the
/// lock is released, and from then on until the pause ends. A second load could find a vCPU running
/// that the first found pending, and counting each state with a separate load could miss it.
#[derive(Debug)]
pub(super) struct RunStates {
    set: Mutex<Set>,
    /// Notified when the vCPUs may run again.
    released: Condvar,
}

#[derive(Debug)]
struct Set {
    states: Vec<Arc<Word>>,
    /// vCPUs that were dropped with I/O pending.
    abandoned: usize,
    /// Whether there ever was a vCPU.
    known: bool,
    paused: bool,
}

/// The state of one vCPU. Methods that change it take `&mut self`, so that only one thread at a
/// time does.
#[derive(Debug)]
pub(super) struct RunState {
    word: Arc<Word>,
    all: Arc<RunStates>,
}

/// A guard of a vCPU in the guest. Dropping it records that the vCPU has left, perhaps with I/O
/// pending.
#[derive(Debug)]
#[must_use = "the vCPU counts as being in the guest until this is dropped"]
pub(super) struct InGuest<'a>(&'a Word);

#[derive(Debug)]
struct Word(AtomicU8);

impl RunStates {
    pub(super) fn new() -> Self {
        Self {
            set: Mutex::new(Set {
                states: Vec::new(),
                abandoned: 0,
                known: false,
                paused: false,
            }),
            released: Condvar::new(),
        }
    }

    /// Adds a vCPU that has never run.
    pub(super) fn add_new(self: &Arc<Self>) -> RunState {
        self.add(IDLE)
    }

    /// Adds a vCPU that may have run, and may have I/O pending.
    pub(super) fn add_adopted(self: &Arc<Self>) -> RunState {
        self.add(ADOPTED)
    }

    /// Keeps all vCPUs out of the guest until [`resume`](Self::resume).
    pub(super) fn pause(&self) -> Result<(), PauseError> {
        let mut set = self.lock();
        if set.paused {
            return Err(PauseError::AlreadyPaused);
        }
        if !set.known {
            return Err(PauseError::NoVcpu);
        }
        let (mut running, mut pending) = (0, 0);
        for state in &set.states {
            // One load of each state: see the protocol. The writes of an idle vCPU's thread to
            // guest memory happened before.
            match state.load(Ordering::Acquire) {
                IDLE => {}
                RUNNING => running += 1,
                _ => pending += 1,
            }
        }
        if running > 0 {
            return Err(PauseError::Running { running });
        }
        if pending > 0 {
            return Err(PauseError::IoPending { pending });
        }
        if set.abandoned > 0 {
            let abandoned = set.abandoned;
            return Err(PauseError::Abandoned { abandoned });
        }
        set.paused = true;
        Ok(())
    }

    /// Ends a pause.
    pub(super) fn resume(&self) {
        self.lock().paused = false;
        self.released.notify_all();
    }

    fn add(self: &Arc<Self>, state: u8) -> RunState {
        let word = Arc::new(Word(AtomicU8::new(state)));
        let mut set = self.lock();
        set.states.push(Arc::clone(&word));
        set.known = true;
        drop(set);
        RunState {
            word,
            all: Arc::clone(self),
        }
    }

    /// Takes the lock once no pause is under way.
    fn lock_released(&self) -> MutexGuard<'_, Set> {
        let mut set = self.lock();
        while set.paused {
            let waited = self.released.wait(set);
            set = waited.unwrap_or_else(PoisonError::into_inner);
        }
        set
    }

    fn lock(&self) -> MutexGuard<'_, Set> {
        // No panic under the lock leaves the set half-changed.
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunState {
    /// Enters the guest. Waits while the vCPUs are paused.
    pub(super) fn enter(&mut self) -> InGuest<'_> {
        if self.word.load(Ordering::Relaxed) == PENDING {
            // Both states forbid a pause, so this needs no lock.
            self.word.0.store(RUNNING, Ordering::Relaxed);
        } else {
            let set = self.all.lock_released();
            self.word.0.store(RUNNING, Ordering::Relaxed);
            drop(set);
        }
        InGuest(&self.word)
    }

    /// Prepares the completion of pending I/O, and returns whether any may be pending. Waits while
    /// the vCPUs are paused, which is possible for an adopted one.
    ///
    /// Until [`completed`](Self::completed) the I/O counts as pending, even after an error or a
    /// panic.
    pub(super) fn begin_completion(&mut self) -> bool {
        match self.word.load(Ordering::Relaxed) {
            IDLE => false,
            ADOPTED => {
                let set = self.all.lock_released();
                self.word.0.store(PENDING, Ordering::Relaxed);
                drop(set);
                true
            }
            _ => true,
        }
    }

    /// Records that no I/O is pending.
    pub(super) fn completed(&mut self) {
        self.word.0.store(IDLE, Ordering::Release);
    }

    /// Returns whether this is the state of a vCPU of `all`.
    pub(super) fn is_of(&self, all: &Arc<RunStates>) -> bool {
        Arc::ptr_eq(&self.all, all)
    }
}

impl Drop for RunState {
    fn drop(&mut self) {
        let mut set = self.all.lock();
        set.states.retain(|word| !Arc::ptr_eq(word, &self.word));
        if self.word.load(Ordering::Relaxed) != IDLE {
            set.abandoned += 1;
        }
    }
}

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        self.0.0.store(PENDING, Ordering::Release);
    }
}

impl Word {
    fn load(&self, order: Ordering) -> u8 {
        let state = self.0.load(order);
        #[cfg(all(test, not(ramsnap_loom)))]
        tests::after_load(self);
        state
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// Makes a pending vCPU enter the guest right after each load of its state by this thread.
        static ENTER_AFTER_LOAD: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn after_load(word: &Word) {
        if ENTER_AFTER_LOAD.get() {
            // Does what the thread of a pending vCPU does, which takes no lock.
            let (from, to) = (PENDING, RUNNING);
            let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
            let _ = word.0.compare_exchange(from, to, success, failure);
        }
    }

    fn vcpus() -> Arc<RunStates> {
        Arc::new(RunStates::new())
    }

    #[test]
    fn pause_is_refused_if_a_pending_vcpu_enters_between_loads() {
        let vcpus = vcpus();
        let mut vcpu = vcpus.add_new();
        drop(vcpu.enter());
        ENTER_AFTER_LOAD.set(true);
        let paused = vcpus.pause();
        ENTER_AFTER_LOAD.set(false);
        assert_eq!(vcpu.word.0.load(Ordering::Relaxed), RUNNING);
        assert_eq!(paused, Err(PauseError::IoPending { pending: 1 }));
        assert_eq!(vcpus.pause(), Err(PauseError::Running { running: 1 }));
    }

    #[test]
    fn each_state_permits_or_forbids_a_pause() {
        let vcpus = vcpus();
        assert_eq!(vcpus.pause(), Err(PauseError::NoVcpu));
        let mut vcpu = vcpus.add_new();
        assert!(!vcpu.begin_completion());
        assert_eq!(vcpus.pause(), Ok(()));
        assert_eq!(vcpus.pause(), Err(PauseError::AlreadyPaused));
        vcpus.resume();
        let in_guest = vcpu.enter();
        assert_eq!(vcpus.pause(), Err(PauseError::Running { running: 1 }));
        drop(in_guest);
        assert_eq!(vcpus.pause(), Err(PauseError::IoPending { pending: 1 }));
        assert!(vcpu.begin_completion());
        vcpu.completed();
        assert_eq!(vcpus.pause(), Ok(()));
        vcpus.resume();
        drop(vcpu);
        assert_eq!(vcpus.pause(), Ok(()));
    }

    #[test]
    fn failed_completion_of_an_adopted_vcpu_stays_pending() {
        let vcpus = vcpus();
        let mut vcpu = vcpus.add_adopted();
        assert!(vcpu.begin_completion());
        // KVM_RUN failed: the I/O was not completed.
        assert_eq!(vcpus.pause(), Err(PauseError::IoPending { pending: 1 }));
        assert!(vcpu.begin_completion());
        vcpu.completed();
        assert_eq!(vcpus.pause(), Ok(()));
    }

    #[test]
    fn dropping_a_vcpu_with_pending_io_forbids_every_pause() {
        let vcpus = vcpus();
        let mut vcpu = vcpus.add_new();
        drop(vcpu.enter());
        drop(vcpu);
        assert_eq!(vcpus.pause(), Err(PauseError::Abandoned { abandoned: 1 }));
    }
}

#[cfg(all(test, ramsnap_loom))]
mod interleavings;
