//! Restoring the vCPUs of a machine, each on its own thread, in the order that the framework's
//! interrupt controller needs.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use applevisor_sys::hv_sys_reg_t;
use thiserror::Error;

use super::create_vcpu::CreateVcpuError;
use super::errors::RestoreError;
use super::gic::GicError;
use super::vcpu::Vcpu;
use super::vcpu_state::Restored;
use super::vm::{Instance, Vm};
use crate::state::{GicState, VcpuState};

/// The affinity fields (Arm ARM, MPIDR_EL1): Aff3, and Aff2 to Aff0.
const AFFINITY: u64 = 0xff_00ff_ffff;

/// The turn of one vCPU in the restore of a machine, returned by [`Vm::restore_vcpus`].
///
/// The thread of the vCPU takes it by [`restore`](Self::restore). If one is dropped instead, the
/// restore fails on all threads.
#[derive(Debug)]
#[must_use = "the other vCPUs are not restored without this one"]
pub struct VcpuTurn {
    number: usize,
    restore: Arc<MachineRestore>,
    done: bool,
}

/// The restore of one machine.
#[derive(Debug)]
struct MachineRestore {
    vm: Vm,
    /// In the order in which the vCPUs are created.
    states: Vec<VcpuState>,
    gic: Option<GicState>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    /// The number of vCPUs that exist and have their affinity.
    created: usize,
    /// The offset of the virtual counter, once all vCPUs exist and the interrupt controller is
    /// restored.
    vtimer_offset: Option<u64>,
    /// The number of vCPUs that have their state.
    restored: usize,
    /// A vCPU is not restored.
    failed: bool,
}

impl Vm {
    /// Begins to restore all vCPUs of a machine, and its interrupt controller. Returns a turn for
    /// each vCPU, in the order in which they were created.
    ///
    /// Each vCPU belongs to its own thread, which calls [`VcpuTurn::restore`]. The threads may do
    /// so in any order. The calls wait for each other, and these steps follow:
    /// 1. The vCPUs are created one at a time, in the order of
    ///    [`creation_index`](VcpuState::creation_index), and each gets its affinity (MPIDR_EL1).
    /// 2. The state of the interrupt controller is restored, once.
    /// 3. Each thread restores the state of its vCPU. All virtual timers get one offset, with which
    ///    no time has passed for the guest.
    /// 4. When all vCPUs are restored, the calls return, and the vCPUs may run.
    ///
    /// # Errors
    /// Returns [`VcpuTurnsError`] if the states are not those of one machine, or not of a machine
    /// like this one.
    ///
    /// # Examples
    /// ```no_run
    /// # use hvf_backend::{GicState, Vcpu, VcpuState};
    /// # fn run(vcpu: Vcpu) {}
    /// # fn start(
    /// #     vcpus: Vec<VcpuState>,
    /// #     gic: GicState,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// use hvf_backend::{GicPlace, Vm};
    ///
    /// let place = GicPlace { distributor: 0x800_0000, redistributors: 0x1000_0000 };
    /// let vm = Vm::options().gic(place).create()?;
    /// // ... map the RAM and write the snapshot to it ...
    /// // `vcpus` and `gic` are the states that were captured.
    /// std::thread::scope(|scope| {
    ///     for turn in vm.restore_vcpus(vcpus, Some(gic))? {
    ///         scope.spawn(move || match turn.restore() {
    ///             Ok((vcpu, _restored)) => run(vcpu),
    ///             Err(error) => eprintln!("{error}"),
    ///         });
    ///     }
    ///     Ok::<(), hvf_backend::VcpuTurnsError>(())
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn restore_vcpus(
        &self,
        states: impl IntoIterator<Item = VcpuState>,
        gic: Option<GicState>,
    ) -> Result<Vec<VcpuTurn>, VcpuTurnsError> {
        let mut states: Vec<_> = states.into_iter().collect();
        states.sort_by_key(|state| state.creation_index);
        let has_gic = matches!(self.instance, Instance::Gic(_));
        if gic.is_some() != has_gic {
            return Err(VcpuTurnsError::Gic {
                captured: gic.is_some(),
            });
        }
        if has_gic {
            self.check_order(&states)?;
        }
        let numbers = 0..states.len();
        let restore = Arc::new(MachineRestore {
            vm: self.clone(),
            states,
            gic,
            progress: Mutex::default(),
            changed: Condvar::new(),
        });
        let turn = |number| VcpuTurn {
            number,
            restore: Arc::clone(&restore),
            done: false,
        };
        Ok(numbers.map(turn).collect())
    }

    /// Checks that the vCPUs can be created in the captured order, and that each has an affinity of
    /// its own.
    fn check_order(&self, states: &[VcpuState]) -> Result<(), VcpuTurnsError> {
        let created = self.vcpus.lock().created;
        if created > 0 {
            return Err(VcpuTurnsError::VcpusExist { created });
        }
        for (expected, state) in (0..).zip(states) {
            let found = state.creation_index;
            if found != Some(expected) {
                return Err(VcpuTurnsError::CreationOrder { expected, found });
            }
            let affinity = affinity(state).map(|value| value & AFFINITY);
            let first = (0..)
                .zip(states)
                .find(|(_, other)| self::affinity(other).map(|value| value & AFFINITY) == affinity);
            if let Some((first, _)) = first.filter(|(first, _)| *first != expected) {
                return Err(VcpuTurnsError::SameAffinity {
                    first,
                    second: expected,
                });
            }
        }
        Ok(())
    }
}

impl VcpuTurn {
    /// Returns the state that will be restored.
    pub fn state(&self) -> &VcpuState {
        &self.restore.states[self.number]
    }

    /// Creates the vCPU and restores its state, on this thread. Waits until all vCPUs of the
    /// machine are restored.
    ///
    /// Each turn needs a thread of its own: a call waits until the other turns are taken or
    /// dropped.
    ///
    /// # Errors
    /// Returns [`RestoreVcpuError`] if this or any other vCPU can't be restored. No vCPU has run,
    /// and the machine is unusable.
    pub fn restore(mut self) -> Result<(Vcpu, Restored), RestoreVcpuError> {
        let restored = self.restore_in_order()?;
        self.done = true;
        Ok(restored)
    }

    fn restore_in_order(&self) -> Result<(Vcpu, Restored), RestoreVcpuError> {
        let (restore, number) = (&*self.restore, self.number);
        drop(restore.wait(|progress| progress.created == number)?);
        let vcpu = restore.vm.create_vcpu().map_err(RestoreVcpuError::Create)?;
        if let Some(affinity) = affinity(self.state()) {
            set_affinity(&vcpu, affinity)?;
        }
        let mut progress = restore.progress();
        progress.created += 1;
        if progress.created == restore.states.len() {
            // All vCPUs exist, and none has run.
            if let Some(gic) = &restore.gic {
                restore.vm.restore_gic(gic)?;
            }
            progress.vtimer_offset = Some(restore.states[0].vtimer.resuming_offset());
        }
        drop(progress);
        restore.changed.notify_all();

        let progress = restore.wait(|progress| progress.vtimer_offset.is_some())?;
        let offset = progress.vtimer_offset.unwrap_or_default();
        drop(progress);
        let restored = self.state().restore(&vcpu, offset)?;
        restore.progress().restored += 1;
        restore.changed.notify_all();
        drop(restore.wait(|progress| progress.restored == restore.states.len())?);
        Ok((vcpu, restored))
    }
}

impl Drop for VcpuTurn {
    fn drop(&mut self) {
        if !self.done {
            self.restore.progress().failed = true;
            self.restore.changed.notify_all();
        }
    }
}

impl MachineRestore {
    /// Locks the progress. A panic can't leave it inconsistent.
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the condition is met.
    fn wait(
        &self,
        is_met: impl Fn(&Progress) -> bool,
    ) -> Result<MutexGuard<'_, Progress>, RestoreVcpuError> {
        let waits = |progress: &mut Progress| !is_met(progress) && !progress.failed;
        let progress = self.changed.wait_while(self.progress(), waits);
        let progress = progress.unwrap_or_else(PoisonError::into_inner);
        match is_met(&progress) {
            true => Ok(progress),
            false => Err(RestoreVcpuError::Other),
        }
    }
}

/// Returns the captured MPIDR_EL1.
fn affinity(state: &VcpuState) -> Option<u64> {
    let is_affinity = |register: u16| register == hv_sys_reg_t::MPIDR_EL1 as u16;
    let mut system = state.system.iter();
    let saved = system.find(|saved| is_affinity(saved.register.0))?;
    Some(saved.value)
}

fn set_affinity(vcpu: &Vcpu, affinity: u64) -> Result<(), RestoreError> {
    let set = vcpu.set_system_register(hv_sys_reg_t::MPIDR_EL1, affinity);
    set.map_err(|source| RestoreError::Register {
        register: "MPIDR_EL1".to_owned(),
        source,
    })
}

/// An error for beginning to restore the vCPUs of a machine.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VcpuTurnsError {
    /// Only one of the state and the machine has an interrupt controller.
    #[error(
        "the {} has no state of the framework's interrupt controller, but the {} has one: create \
         the machine like the captured one (`Vm::options().gic(..)`)",
        if *.captured { "machine" } else { "snapshot" },
        if *.captured { "snapshot" } else { "machine" }
    )]
    Gic {
        /// Whether the captured machine had an interrupt controller.
        captured: bool,
    },
    /// The machine has created vCPUs before.
    #[error(
        "the machine has created vCPUs ({created}), whose redistributors come first: restore into a \
         new machine"
    )]
    VcpusExist {
        /// The number of vCPUs that were created.
        created: u32,
    },
    /// A state is missing, or is passed twice, or was not captured.
    #[error(
        "the states are not those of all vCPUs of one machine: the state of vCPU {expected} in the \
         order of creation was expected, but {} was found: pass the state of each vCPU once",
        .found.map_or("one without a number".to_owned(), |found| format!("that of vCPU {found}"))
    )]
    CreationOrder {
        /// The number whose turn it is.
        expected: u32,
        /// The number that was found.
        found: Option<u32>,
    },
    /// Two vCPUs have the same affinity, by which the interrupt controller identifies them.
    #[error(
        "vCPUs {first} and {second} have the same affinity: set MPIDR_EL1 of each vCPU before the \
         guest first runs"
    )]
    SameAffinity {
        /// The number of one vCPU in the order of creation.
        first: u32,
        /// The number of the other.
        second: u32,
    },
}

/// An error for restoring one of the vCPUs of a machine. No vCPU has run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreVcpuError {
    /// The vCPU could not be created.
    #[error("failed to restore a vCPU: {0}")]
    Create(#[source] CreateVcpuError),
    /// The state of the interrupt controller could not be restored.
    #[error("failed to restore the machine of a vCPU: {0}")]
    Gic(#[from] GicError),
    /// The state of the vCPU could not be restored.
    #[error("failed to restore a vCPU of the machine: {0}")]
    State(#[from] RestoreError),
    /// Another vCPU of the machine was not restored: its thread has the error, or has dropped its
    /// turn.
    #[error("another vCPU of the machine was not restored: see the error of its thread")]
    Other,
}
