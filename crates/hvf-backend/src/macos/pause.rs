//! Pausing all vCPUs of a machine.

#![allow(unsafe_code)]

use applevisor_sys::{hv_vcpu_t, hv_vcpus_exit};

use super::errors::HvError;
use super::vcpu::Vcpu;
use super::vm::Vm;

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
        self.vcpus.begin_pause();
        // Ends the pause if a call fails.
        let paused = Paused(self.clone());
        self.vcpus.wait_until_parked(request_exits)?;
        Ok(paused)
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
        self.vm.vcpus.park(self.id);
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.vcpus.end_pause();
    }
}
