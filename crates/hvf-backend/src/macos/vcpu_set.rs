//! The vCPUs of a machine, and whether a pause is wanted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use applevisor_sys::hv_vcpu_t;

/// The time after which a vCPU that has not parked is requested to exit again. The first request is
/// lost if the framework forgets one that comes before the vCPU runs.
const REPEAT: Duration = Duration::from_millis(1);

/// The vCPUs of a machine.
#[derive(Debug, Default)]
pub(crate) struct VcpuSet {
    /// Whether a pause is wanted. It is set and cleared with the lock held.
    pausing: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// The number of vCPUs that were created.
    pub created: u32,
    /// The number of pauses that have begun and not ended.
    pauses: u32,
    /// The number of times that the vCPUs were resumed.
    resumes: u64,
    vcpus: Vec<Member>,
}

/// A vCPU that exists.
#[derive(Debug)]
struct Member {
    id: hv_vcpu_t,
    thread: ThreadId,
    parked: bool,
}

impl VcpuSet {
    /// Locks the state. A panic can't leave it inconsistent.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_pausing(&self) -> bool {
        self.pausing.load(Ordering::SeqCst)
    }

    pub(super) fn begin_pause(&self) {
        let mut state = self.lock();
        state.pauses += 1;
        self.pausing.store(true, Ordering::SeqCst);
    }

    /// Waits until each vCPU is parked, except for those of this thread. Calls `request` with those
    /// that are not, again and again. The lock is held during the call, so that none of them ends.
    pub(super) fn wait_until_parked<E>(
        &self,
        request: impl Fn(&[hv_vcpu_t]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.lock();
        loop {
            let running = state.running();
            if running.is_empty() {
                return Ok(());
            }
            request(&running)?;
            let waited = self.changed.wait_timeout(state, REPEAT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn end_pause(&self) {
        let mut state = self.lock();
        state.pauses -= 1;
        if state.pauses == 0 {
            // The next pause waits for each vCPU, also where its thread has not noticed this end.
            state.resumes += 1;
            state.vcpus.iter_mut().for_each(|vcpu| vcpu.parked = false);
            self.pausing.store(false, Ordering::SeqCst);
        }
        self.changed.notify_all();
    }

    /// Waits while a pause is wanted, with the vCPU parked.
    pub(super) fn park(&self, id: hv_vcpu_t) {
        let mut state = self.lock();
        let resumes = state.resumes;
        while state.pauses > 0 && state.resumes == resumes {
            state.set_parked(id);
            self.changed.notify_all();
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Removes a vCPU before it is destroyed.
    pub(crate) fn remove(&self, id: hv_vcpu_t) {
        self.lock().vcpus.retain(|vcpu| vcpu.id != id);
        self.changed.notify_all();
    }
}

impl State {
    /// Adds a vCPU of this thread. Returns the number of vCPUs that were created before.
    pub(crate) fn add(&mut self, id: hv_vcpu_t) -> u32 {
        self.vcpus.push(Member {
            id,
            thread: thread::current().id(),
            parked: false,
        });
        let number = self.created;
        self.created += 1;
        number
    }

    /// Adds a vCPU of this thread that another owner has created. Returns whether it is new.
    pub(super) fn adopt(&mut self, id: hv_vcpu_t, creation_index: u32) -> bool {
        if self.vcpus.iter().any(|vcpu| vcpu.id == id) {
            return false;
        }
        let created = self.created.max(creation_index.saturating_add(1));
        self.add(id);
        self.created = created;
        true
    }

    /// Returns the vCPUs that may be in the guest.
    fn running(&self) -> Vec<hv_vcpu_t> {
        let this = thread::current().id();
        let vcpus = self.vcpus.iter();
        let running = vcpus.filter(|vcpu| !vcpu.parked && vcpu.thread != this);
        running.map(|vcpu| vcpu.id).collect()
    }

    fn set_parked(&mut self, id: hv_vcpu_t) {
        let vcpu = self.vcpus.iter_mut().find(|vcpu| vcpu.id == id);
        vcpu.expect("a vCPU that exists").parked = true;
    }
}
