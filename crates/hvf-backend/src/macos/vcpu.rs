//! A virtual CPU: making it, running it, stopping it from elsewhere.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use applevisor_sys::{
    hv_reg_t, hv_sys_reg_t, hv_vcpu_create, hv_vcpu_destroy, hv_vcpu_exit_exception_t,
    hv_vcpu_get_reg, hv_vcpu_get_sys_reg, hv_vcpu_run, hv_vcpu_set_reg, hv_vcpu_set_sys_reg,
    hv_vcpu_t, hv_vcpus_exit,
};

use super::error::HvError;
use super::vm::Vm;
use crate::{Exception, Exit};

/// `hv_vcpu_exit_t`, with the reason as the number that it is. `applevisor` reads it as a Rust enum, for which a reason of a later macOS would be undefined
/// behaviour.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawExit {
    reason: u32,
    exception: hv_vcpu_exit_exception_t,
}

/// A virtual CPU, of the thread that made it: neither `Send` nor `Sync`, since the framework takes its calls from that thread only.
///
/// # Examples
/// ```no_run
/// use hvf_backend::{Exit, Register, Vm};
///
/// let vm = Vm::new()?;
/// let mut vcpu = vm.create_vcpu()?;
/// vcpu.set_register(Register::PC, 0x8000_0000)?;
/// let canceller = vcpu.canceller(); // for other threads
/// match vcpu.run()? {
///     Exit::Canceled => println!("another thread asked for it"),
///     Exit::Exception(exception) => println!("syndrome {:#x}", exception.syndrome),
///     other => println!("{other:?}"),
/// }
/// # canceller.cancel()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) id: hv_vcpu_t,
    /// Where the framework says why the vCPU left.
    exit: NonNull<RawExit>,
    alive: Arc<Mutex<Option<hv_vcpu_t>>>,
    /// A raw pointer is neither `Send` nor `Sync`.
    _of_this_thread: PhantomData<*const ()>,
    /// Last: the machine ends after its vCPUs.
    pub(crate) vm: Vm,
}

/// Makes a vCPU leave its guest, from any thread: [`Vcpu::canceller`].
#[derive(Clone, Debug)]
pub struct Canceller(Arc<Mutex<Option<hv_vcpu_t>>>);

impl Vm {
    /// Makes a vCPU, which belongs to this thread.
    ///
    /// # Errors
    /// [`HvError`]: the framework has no more vCPUs (`HV_NO_RESOURCES`), or this thread has one already (`HV_BUSY`).
    pub fn create_vcpu(&self) -> Result<Vcpu, HvError> {
        let (mut id, mut exit) = (0, ptr::null());
        // SAFETY: the VM lives; both addresses are of variables of the types that the framework writes; a null configuration is the default.
        let code = unsafe { hv_vcpu_create(&raw mut id, &raw mut exit, ptr::null_mut()) };
        HvError::check("hv_vcpu_create", code)?;
        let Some(exit) = NonNull::new(exit.cast_mut()) else {
            unreachable!("hv_vcpu_create succeeded and gave no exit structure");
        };
        Ok(Vcpu {
            id,
            exit: exit.cast(),
            alive: Arc::new(Mutex::new(Some(id))),
            _of_this_thread: PhantomData,
            vm: self.clone(),
        })
    }
}

impl Vcpu {
    /// Runs the guest until something needs the monitor. After a write fault that was answered, run again: the guest's instruction is executed anew.
    ///
    /// # Errors
    /// [`HvError`].
    pub fn run(&mut self) -> Result<Exit, HvError> {
        // SAFETY: the vCPU exists and is of this thread, as `Vcpu` is not Send. What the guest may write is its RAM, which no reference covers.
        let code = unsafe { hv_vcpu_run(self.id) };
        HvError::check("hv_vcpu_run", code)?;
        // SAFETY: the structure is the framework's as long as the vCPU exists, it has the layout of RawExit (a 32-bit number, then three of
        // 64 bits), any bits are a value of that, and it is written only while the vCPU runs.
        let RawExit { reason, exception } = unsafe { self.exit.read() };
        // Hypervisor/hv_vcpu_types.h: hv_exit_reason_t
        Ok(match reason {
            0 => Exit::Canceled,
            1 => Exit::Exception(Exception {
                syndrome: exception.syndrome,
                virtual_address: exception.virtual_address,
                physical_address: exception.physical_address,
            }),
            2 => Exit::VtimerActivated,
            other => Exit::Unknown(other),
        })
    }

    /// What makes this vCPU leave its guest, for other threads.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller(Arc::clone(&self.alive))
    }

    /// The vCPU as the framework numbers it, for calls of `applevisor_sys` on this thread.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The virtual machine.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Reads a general register, PC, PSTATE (`CPSR`), FPCR or FPSR.
    ///
    /// # Errors
    /// [`HvError`].
    pub fn register(&self, register: hv_reg_t) -> Result<u64, HvError> {
        let mut value = 0;
        // SAFETY: the vCPU exists and is of this thread; the address is of a variable.
        let code = unsafe { hv_vcpu_get_reg(self.id, register, &raw mut value) };
        HvError::check("hv_vcpu_get_reg", code).map(|()| value)
    }

    /// Writes a general register, PC, PSTATE (`CPSR`), FPCR or FPSR.
    ///
    /// # Errors
    /// [`HvError`].
    pub fn set_register(&self, register: hv_reg_t, value: u64) -> Result<(), HvError> {
        // SAFETY: the vCPU exists and is of this thread.
        let code = unsafe { hv_vcpu_set_reg(self.id, register, value) };
        HvError::check("hv_vcpu_set_reg", code)
    }

    /// Reads a system register.
    ///
    /// # Errors
    /// [`HvError`]: `HV_BAD_ARGUMENT` where this vCPU does not have it.
    pub fn system_register(&self, register: hv_sys_reg_t) -> Result<u64, HvError> {
        let mut value = 0;
        // SAFETY: the vCPU exists and is of this thread; the address is of a variable.
        let code = unsafe { hv_vcpu_get_sys_reg(self.id, register, &raw mut value) };
        HvError::check("hv_vcpu_get_sys_reg", code).map(|()| value)
    }

    /// Writes a system register.
    ///
    /// # Errors
    /// [`HvError`]: `HV_BAD_ARGUMENT` where this vCPU does not have it, or can't take the value.
    pub fn set_system_register(&self, register: hv_sys_reg_t, value: u64) -> Result<(), HvError> {
        // SAFETY: the vCPU exists and is of this thread.
        let code = unsafe { hv_vcpu_set_sys_reg(self.id, register, value) };
        HvError::check("hv_vcpu_set_sys_reg", code)
    }
}

impl Canceller {
    /// Makes the vCPU leave its guest with [`Exit::Canceled`]; one that is not running leaves at once when it runs next. One that is no more stays that.
    ///
    /// # Errors
    /// [`HvError`].
    pub fn cancel(&self) -> Result<(), HvError> {
        // Held over the call: the vCPU can't end meanwhile, and its number not become another's.
        let alive = lock(&self.0);
        let Some(id) = *alive else { return Ok(()) };
        // SAFETY: one number at the address, of a vCPU that exists. This call may come from any thread.
        let code = unsafe { hv_vcpus_exit(&raw const id, 1) };
        HvError::check("hv_vcpus_exit", code)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        *lock(&self.alive) = None;
        // SAFETY: the vCPU exists, is of this thread and does not run. That it can't be destroyed leaves the machine alive, which the next
        // one to be made will say.
        let _ = unsafe { hv_vcpu_destroy(self.id) };
    }
}

/// It holds a number, which a panic leaves whole.
fn lock(alive: &Mutex<Option<hv_vcpu_t>>) -> MutexGuard<'_, Option<hv_vcpu_t>> {
    alive.lock().unwrap_or_else(PoisonError::into_inner)
}
