//! Pausing all vCPUs of a machine.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use applevisor_sys::{hv_vcpu_t, hv_vcpus_exit};

use super::errors::HvError;
use super::vcpu::Vcpu;
use super::vm::Vm;

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

/// A pause, returned by [`Vm::pause`]: until the value is dropped, no vCPU is in the guest, and
/// none enters.
#[derive(Debug)]
#[must_use = "the vCPUs continue when this is dropped"]
pub struct Paused(Vm);

impl Vm {
    /// Pauses all vCPUs. Makes them leave the guest, also those that wait for an interrupt inside
    /// the framework, and waits until each thread has [parked](Vcpu::park) its vCPU. A vCPU of this
    /// thread counts as parked.
    ///
    /// The thread of each vCPU takes part: it calls [`Vcpu::is_pausing`] before each
    /// [run](Vcpu::run), or after each [`Exit::Canceled`](crate::Exit::Canceled). It then captures
    /// the state of its vCPU, which no other thread can do, and calls [`Vcpu::park`]. If a thread
    /// waits for something else, such as a timer that ends a WFI, the VMM must wake it.
    ///
    /// # Errors
    /// Returns the [`HvError`] of `hv_vcpus_exit`. The vCPUs are then not paused.
    ///
    /// # Examples
    /// ```no_run
    /// use std::sync::mpsc::Sender;
    /// use hvf_backend::{ExitAction, Stage2, Stage2Tracker, Vcpu, VcpuState, Vm};
    ///
    /// fn vcpu_thread(
    ///     vcpu: &mut Vcpu,
    ///     tracker: &Stage2Tracker<Stage2>,
    ///     states: &Sender<VcpuState>,
    /// ) -> Result<(), Box<dyn std::error::Error>> {
    ///     loop {
    ///         if vcpu.is_pausing() {
    ///             states.send(VcpuState::capture(vcpu)?)?;
    ///             vcpu.park();
    ///         }
    ///         let run_guard = tracker.enter();
    ///         let exit = vcpu.run()?;
    ///         if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Resume {
    ///             continue;
    ///         }
    ///         drop(run_guard);
    ///         // ... a device, a hypercall ...
    ///     }
    /// }
    ///
    /// fn save(
    ///     vm: &Vm,
    ///     tracker: &Stage2Tracker<Stage2>,
    /// ) -> Result<(), Box<dyn std::error::Error>> {
    ///     let paused = vm.pause()?; // the states of all vCPUs are sent
    ///     let epoch = tracker.checkpoint()?;
    ///     // ... capture the interrupt controller, write the pages of `epoch.bitmap()` ...
    ///     drop(paused); // the guest continues
    ///     epoch.release()?;
    ///     Ok(())
    /// }
    /// ```
    pub fn pause(&self) -> Result<Paused, HvError> {
        let set = &*self.vcpus;
        let mut state = set.lock();
        state.pauses += 1;
        set.pausing.store(true, Ordering::SeqCst);
        // Ends the pause if a call fails.
        let paused = Paused(self.clone());
        loop {
            let running = state.running();
            if running.is_empty() {
                return Ok(paused);
            }
            if let Err(error) = request_exits(&running) {
                drop(state);
                return Err(error);
            }
            let waited = set.changed.wait_timeout(state, REPEAT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Makes vCPUs exit. The caller holds the lock, so that none of them ends.
fn request_exits(ids: &[hv_vcpu_t]) -> Result<(), HvError> {
    // SAFETY: the address has this number of vCPUs, which exist. Any thread may make this call.
    let code = unsafe { hv_vcpus_exit(ids.as_ptr(), ids.len() as u32) };
    HvError::check("hv_vcpus_exit", code)
}

impl Vcpu {
    /// Returns whether another thread [pauses](Vm::pause) the vCPUs. [`run`](Self::run) then
    /// returns [`Exit::Canceled`](crate::Exit::Canceled) at once.
    #[must_use]
    pub fn is_pausing(&self) -> bool {
        self.vm.vcpus.is_pausing()
    }

    /// Waits while the vCPUs are [paused](Vm::pause). Returns at once if they are not.
    ///
    /// Capture the state of the vCPU before. Drop the [`RunGuard`](crate::RunGuard) too, because a
    /// checkpoint of the pause is refused while one exists.
    pub fn park(&mut self) {
        let set = &*self.vm.vcpus;
        let mut state = set.lock();
        let resumes = state.resumes;
        while state.pauses > 0 && state.resumes == resumes {
            state.set_parked(self.id);
            set.changed.notify_all();
            let waited = set.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let set = &*self.0.vcpus;
        let mut state = set.lock();
        state.pauses -= 1;
        if state.pauses == 0 {
            // The next pause waits for each vCPU, also where its thread has not noticed this end.
            state.resumes += 1;
            state.vcpus.iter_mut().for_each(|vcpu| vcpu.parked = false);
            set.pausing.store(false, Ordering::SeqCst);
        }
        set.changed.notify_all();
    }
}

impl VcpuSet {
    /// Locks the state. A panic can't leave it inconsistent.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_pausing(&self) -> bool {
        self.pausing.load(Ordering::SeqCst)
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
