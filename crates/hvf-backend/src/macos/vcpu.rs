//! A virtual CPU: creating it, running it, and stopping it from another thread.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use applevisor_sys::{
    hv_reg_t, hv_sys_reg_t, hv_vcpu_create, hv_vcpu_destroy, hv_vcpu_exit_exception_t,
    hv_vcpu_get_reg, hv_vcpu_get_sys_reg, hv_vcpu_run, hv_vcpu_set_reg, hv_vcpu_set_sys_reg,
    hv_vcpu_t, hv_vcpus_exit,
};

use super::errors::HvError;
use super::numbers::{EXIT_CANCELED, EXIT_EXCEPTION, EXIT_VTIMER_ACTIVATED};
use super::vm::Vm;
use crate::exit::{Exception, Exit};

/// `hv_vcpu_exit_t` with the reason as a number.
///
/// `applevisor` reads the reason as a Rust enum, for which a reason of a later macOS is undefined
/// behavior.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawExit {
    reason: u32,
    exception: hv_vcpu_exit_exception_t,
}

/// A virtual CPU, which belongs to the thread that created it.
///
/// It is neither `Send` nor `Sync`, because the framework accepts its calls only on that thread.
///
/// # Examples
/// ```no_run
/// use hvf_backend::{Exit, Register, Vm};
///
/// let vm = Vm::new()?;
/// let mut vcpu = vm.create_vcpu()?;
/// vcpu.set_register(Register::PC, 0x8000_0000)?;
/// let canceller = vcpu.canceller(); // for use by other threads
/// match vcpu.run()? {
///     Exit::Canceled => println!("another thread requested the exit"),
///     Exit::Exception(exception) => println!("syndrome {:#x}", exception.syndrome),
///     other => println!("{other:?}"),
/// }
/// # canceller.cancel()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the vCPU is destroyed when this is dropped"]
pub struct Vcpu {
    pub(crate) id: hv_vcpu_t,
    /// The number of vCPUs that the machine had created before.
    pub(crate) creation_index: u32,
    /// The framework's exit structure. None if another owner has created the vCPU, runs it and
    /// destroys it.
    exit: Option<NonNull<RawExit>>,
    /// The number of the vCPU while it exists.
    live_id: Arc<Mutex<Option<hv_vcpu_t>>>,
    /// Makes the type neither `Send` nor `Sync`.
    _not_send: PhantomData<*const ()>,
    /// The last field, so that the machine ends after its vCPUs.
    pub(crate) vm: Vm,
}

/// A handle that makes a vCPU leave its guest from any thread, returned by [`Vcpu::canceller`].
#[derive(Clone, Debug)]
pub struct Canceller(Arc<Mutex<Option<hv_vcpu_t>>>);

impl Vcpu {
    /// Creates a vCPU of this thread, as the framework has it.
    pub(super) fn create(vm: &Vm) -> Result<Self, HvError> {
        // Held during the call, so that the numbers have the order of the calls.
        let mut vcpus = vm.vcpus.lock();
        let (mut id, mut exit) = (0, ptr::null());
        // SAFETY: the VM exists. Both addresses are of variables of the types that the framework
        // writes. A null configuration is the default.
        let code = unsafe { hv_vcpu_create(&raw mut id, &raw mut exit, ptr::null_mut()) };
        HvError::check("hv_vcpu_create", code)?;
        let Some(exit) = NonNull::new(exit.cast_mut()) else {
            unreachable!("hv_vcpu_create succeeded without an exit structure");
        };
        let creation_index = vcpus.add(id);
        // Dropping the vCPU locks them.
        drop(vcpus);
        Ok(Self {
            id,
            creation_index,
            exit: Some(exit.cast()),
            live_id: Arc::new(Mutex::new(Some(id))),
            _not_send: PhantomData,
            vm: vm.clone(),
        })
    }

    /// Returns a vCPU of this thread that another owner has created. None if there is one already.
    pub(super) fn adopt(vm: &Vm, id: hv_vcpu_t, creation_index: u32) -> Option<Self> {
        let is_new = vm.vcpus.lock().adopt(id, creation_index);
        is_new.then(|| Self {
            id,
            creation_index,
            exit: None,
            live_id: Arc::new(Mutex::new(Some(id))),
            _not_send: PhantomData,
            vm: vm.clone(),
        })
    }

    /// Runs the guest until an exit.
    ///
    /// After a handled write fault, run the vCPU again. The guest then repeats the instruction.
    ///
    /// While the vCPUs are [paused](Vm::pause), this returns [`Exit::Canceled`] without running the
    /// guest.
    ///
    /// With the framework's interrupt controller, a guest that executes WFI waits inside this call,
    /// until an interrupt is signalled to it or another thread [cancels](Canceller::cancel) the
    /// call. Without one, WFI is an exit.
    ///
    /// # Errors
    /// Returns the [`HvError`] of the call.
    pub fn run(&mut self) -> Result<Exit, HvError> {
        if self.vm.vcpus.is_pausing() {
            return Ok(Exit::Canceled);
        }
        let Some(exit) = self.exit else {
            unreachable!("a vCPU of another owner is not lent for running");
        };
        // SAFETY: the vCPU exists and belongs to this thread, because `Vcpu` is not Send. The guest
        // can only write its RAM, which no reference covers.
        let code = unsafe { hv_vcpu_run(self.id) };
        HvError::check("hv_vcpu_run", code)?;
        // SAFETY: the structure stays valid while the vCPU exists. It has the layout of RawExit (a
        // 32-bit number, then three of 64 bits), of which any bits are a valid value. It is written
        // only while the vCPU runs.
        let RawExit { reason, exception } = unsafe { exit.read() };
        Ok(match reason {
            EXIT_CANCELED => Exit::Canceled,
            EXIT_EXCEPTION => Exit::Exception(Exception {
                syndrome: exception.syndrome,
                virtual_address: exception.virtual_address,
                physical_address: exception.physical_address,
            }),
            EXIT_VTIMER_ACTIVATED => Exit::VtimerActivated,
            other => Exit::Unknown(other),
        })
    }

    /// Returns a handle with which other threads make this vCPU leave its guest.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller(Arc::clone(&self.live_id))
    }

    /// Returns the framework's number of the vCPU, for calls of `applevisor_sys` on this thread.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the number of vCPUs that the machine had created before this one.
    #[must_use]
    pub fn creation_index(&self) -> u32 {
        self.creation_index
    }

    /// Returns the virtual machine.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Reads a general register, PC, PSTATE (`CPSR`), FPCR or FPSR.
    ///
    /// # Errors
    /// Returns the [`HvError`] of the call.
    pub fn register(&self, register: hv_reg_t) -> Result<u64, HvError> {
        let mut value = 0;
        // SAFETY: the vCPU exists and belongs to this thread. The address is of a variable.
        let code = unsafe { hv_vcpu_get_reg(self.id, register, &raw mut value) };
        HvError::check("hv_vcpu_get_reg", code).map(|()| value)
    }

    /// Writes a general register, PC, PSTATE (`CPSR`), FPCR or FPSR.
    ///
    /// # Errors
    /// Returns the [`HvError`] of the call.
    pub fn set_register(&self, register: hv_reg_t, value: u64) -> Result<(), HvError> {
        // SAFETY: the vCPU exists and belongs to this thread.
        let code = unsafe { hv_vcpu_set_reg(self.id, register, value) };
        HvError::check("hv_vcpu_set_reg", code)
    }

    /// Reads a system register.
    ///
    /// # Errors
    /// Returns [`HvError`] with `HV_BAD_ARGUMENT` if this vCPU does not have the register.
    pub fn system_register(&self, register: hv_sys_reg_t) -> Result<u64, HvError> {
        let mut value = 0;
        // SAFETY: the vCPU exists and belongs to this thread. The address is of a variable.
        let code = unsafe { hv_vcpu_get_sys_reg(self.id, register, &raw mut value) };
        HvError::check("hv_vcpu_get_sys_reg", code).map(|()| value)
    }

    /// Writes a system register.
    ///
    /// # Errors
    /// Returns [`HvError`] with `HV_BAD_ARGUMENT` if this vCPU does not have the register or does
    /// not accept the value.
    pub fn set_system_register(&self, register: hv_sys_reg_t, value: u64) -> Result<(), HvError> {
        // SAFETY: the vCPU exists and belongs to this thread.
        let code = unsafe { hv_vcpu_set_sys_reg(self.id, register, value) };
        HvError::check("hv_vcpu_set_sys_reg", code)
    }
}

impl Canceller {
    /// Makes the vCPU leave its guest with [`Exit::Canceled`].
    ///
    /// A vCPU that waits for an interrupt inside [`Vcpu::run`] leaves too. Its program counter is
    /// at or after the WFI, and either continues correctly.
    ///
    /// If the vCPU is not running, its next run exits at once. Requests are not counted: several
    /// are answered by one exit. A vCPU may also leave for another reason, and answer in its next
    /// run, so [`Exit::Canceled`] can come when nothing is left to do. If the vCPU no longer
    /// exists, this has no effect. [`Vm::pause`] cancels all vCPUs of a machine.
    ///
    /// # Errors
    /// Returns the [`HvError`] of the call.
    pub fn cancel(&self) -> Result<(), HvError> {
        // The lock is held during the call, so that the vCPU can't end and its number can't be
        // reused.
        let live_id = lock(&self.0);
        let Some(id) = *live_id else { return Ok(()) };
        // SAFETY: the address has one number, of a vCPU that exists. Any thread may make this call.
        let code = unsafe { hv_vcpus_exit(&raw const id, 1) };
        HvError::check("hv_vcpus_exit", code)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        *lock(&self.live_id) = None;
        self.vm.vcpus.remove(self.id);
        if self.exit.is_none() {
            return;
        }
        // SAFETY: the vCPU exists, belongs to this thread and is not running. If the call fails,
        // the machine continues to exist, and creating the next machine returns an error.
        let _ = unsafe { hv_vcpu_destroy(self.id) };
    }
}

/// Locks the number of a vCPU. A panic can't leave it inconsistent.
fn lock(live_id: &Mutex<Option<hv_vcpu_t>>) -> MutexGuard<'_, Option<hv_vcpu_t>> {
    live_id.lock().unwrap_or_else(PoisonError::into_inner)
}
