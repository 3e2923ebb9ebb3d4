//! Virtual CPUs: creating and ending them, and what other threads may do with them.
//!
//! A vCPU lives in a variable of its thread, so no other thread finds it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::calls::{Code, Outcome, answer_object, framework, give};
use crate::emulation::Emulation;
use crate::gic::{self, Registers};
use crate::objects::{self, Object};
use crate::sme::Sme;
use crate::{control, vm};

/// The number of vCPUs of a machine.
const MAX_VCPUS: usize = 16;

/// `hv_vcpu_exit_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuExit {
    /// `hv_exit_reason_t`
    pub reason: u32,
    pub exception: ExitException,
}

/// `hv_vcpu_exit_exception_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExitException {
    pub syndrome: u64,
    pub virtual_address: u64,
    pub physical_address: u64,
}

/// The reasons of `hv_exit_reason_t`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Exit {
    Canceled,
    Exception(ExitException),
    VtimerActivated,
}

/// What other threads see of a vCPU.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Another thread asked the vCPU to exit.
    pub canceled: AtomicBool,
    /// The vCPU looks at the other fields before its next instruction.
    pub attention: AtomicBool,
    /// The vCPU is in `hv_vcpu_run`.
    pub running: AtomicBool,
    /// The interrupt controller signals an interrupt.
    pub interrupt: AtomicBool,
    /// The guest waits for an interrupt.
    pub waiting: AtomicBool,
    /// The vCPU emulates instructions.
    pub emulating: AtomicBool,
    /// Translated code is to be forgotten.
    pub stale_code: AtomicBool,
    /// A store is permitted, and may not be in memory yet.
    pub storing: AtomicBool,
    /// The version of the memory that is mapped into the engine.
    pub memory_version: AtomicU64,
    /// The number of vCPUs that the process had created before.
    pub serial: u64,
    /// MPIDR_EL1
    pub affinity: AtomicU64,
    /// The registers of the vCPU's redistributor.
    pub redistributor: Mutex<Registers>,
    /// The interrupt controller's registers of this CPU.
    pub cpu_interface: Mutex<BTreeMap<u16, u64>>,
    /// The thread of the vCPU has ended without destroying it.
    orphaned: AtomicBool,
}

impl Shared {
    pub(crate) fn cpu_interface(&self) -> MutexGuard<'_, BTreeMap<u16, u64>> {
        let interface = self.cpu_interface.lock();
        interface.unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU, for its own thread.
pub(crate) struct Vcpu {
    pub id: u64,
    pub emulation: Emulation,
    pub shared: Arc<Shared>,
    pub sme: Sme,
    exit: Box<VcpuExit>,
    trap_debug_exceptions: bool,
    trap_debug_reg_accesses: bool,
}

thread_local! {
    static OWN: RefCell<Option<Vcpu>> = const { RefCell::new(None) };
}

/// All vCPUs by their numbers.
static ALL: Mutex<Vec<Option<Arc<Shared>>>> = Mutex::new(Vec::new());

fn all() -> MutexGuard<'static, Vec<Option<Arc<Shared>>>> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn each() -> Vec<Arc<Shared>> {
    all().iter().flatten().cloned().collect()
}

/// Returns the vCPUs in the order in which they were created.
pub(crate) fn in_order() -> Vec<Arc<Shared>> {
    let mut vcpus = each();
    vcpus.sort_by_key(|vcpu| vcpu.serial);
    vcpus
}

/// Returns whether a vCPU exists. One whose thread ended without destroying it does.
pub(crate) fn exist() -> bool {
    !each().is_empty()
}

/// Returns whether a guest waits for an interrupt.
pub(crate) fn waits() -> bool {
    each()
        .iter()
        .any(|vcpu| vcpu.waiting.load(Ordering::SeqCst))
}

/// Forgets the vCPUs, whose threads have ended.
pub(crate) fn clear() {
    let owned = |vcpu: &Arc<Shared>| !vcpu.orphaned.load(Ordering::SeqCst);
    assert!(
        !each().iter().any(owned),
        "a thread has a vCPU: only that thread can destroy it"
    );
    all().clear();
}

/// Calls `function` with a vCPU of this thread.
pub(crate) fn own<T>(
    id: u64,
    function: impl FnOnce(&mut Vcpu) -> Result<T, Code>,
) -> Result<T, Code> {
    OWN.with_borrow_mut(|own| match own {
        Some(vcpu) if vcpu.id == id => function(vcpu),
        _ => Err(Code::BAD_ARGUMENT),
    })
}

/// Waits until no vCPU emulates with older mappings.
pub(crate) fn follow(version: u64) {
    for vcpu in each() {
        vcpu.attention.store(true, Ordering::SeqCst);
        while vcpu.emulating.load(Ordering::SeqCst)
            && vcpu.memory_version.load(Ordering::SeqCst) < version
        {
            thread::yield_now();
        }
    }
}

/// Makes each vCPU forget translated code.
pub(crate) fn forget_code() {
    for vcpu in each() {
        vcpu.stale_code.store(true, Ordering::SeqCst);
        vcpu.attention.store(true, Ordering::SeqCst);
    }
}

/// Waits until each store that is permitted now is in memory.
pub(crate) fn finish_stores() {
    for vcpu in each() {
        while vcpu.storing.load(Ordering::SeqCst) {
            thread::yield_now();
        }
    }
}

fn create(id: *mut u64, exit: *mut *const VcpuExit, config: *mut c_void) -> Outcome {
    vm::with(|_| Ok(()))?;
    if !config.is_null() {
        objects::with(config, |object| match object {
            Object::VcpuConfig => Ok(()),
            _ => Err(Code::BAD_ARGUMENT),
        })?;
    }
    if OWN.with_borrow(Option::is_some) {
        return Err(Code::BUSY);
    }
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let shared = Arc::new(Shared {
        serial: SERIAL.fetch_add(1, Ordering::SeqCst),
        affinity: AtomicU64::new(1 << 31),
        cpu_interface: Mutex::new(gic::new_cpu_interface()),
        ..Shared::default()
    });
    let mut all = all();
    let number = match all.iter().position(Option::is_none) {
        Some(free) => free,
        None if all.len() < MAX_VCPUS => {
            all.push(None);
            all.len() - 1
        }
        None => return Err(Code::NO_RESOURCES),
    };
    let vcpu = Vcpu {
        id: number as u64,
        emulation: Emulation::new(Arc::clone(&shared)).map_err(|_| Code::ERROR)?,
        shared: Arc::clone(&shared),
        sme: Sme::default(),
        exit: Box::default(),
        trap_debug_exceptions: false,
        trap_debug_reg_accesses: false,
    };
    give(id, vcpu.id)?;
    give(exit, &raw const *vcpu.exit)?;
    all[number] = Some(shared);
    OWN.set(Some(vcpu));
    Ok(())
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.orphaned.store(true, Ordering::SeqCst);
    }
}

fn destroy(id: u64) -> Outcome {
    own(id, |_| Ok(()))?;
    OWN.set(None);
    all()[id as usize] = None;
    Ok(())
}

fn run(vcpu: &mut Vcpu) -> Outcome {
    vm::with(|machine| {
        machine.has_run = true;
        Ok(())
    })?;
    vcpu.shared.running.store(true, Ordering::SeqCst);
    let exit = vcpu.emulation.run();
    vcpu.shared.running.store(false, Ordering::SeqCst);
    let exit = exit?;
    let (reason, exception) = match exit {
        Exit::Canceled => (0, ExitException::default()),
        Exit::Exception(exception) => (1, exception),
        Exit::VtimerActivated => (2, ExitException::default()),
    };
    *vcpu.exit = VcpuExit {
        reason: control::take_exit_reason().unwrap_or(reason),
        exception,
    };
    Ok(())
}

fn request_exits(ids: *const u64, count: u32) -> Outcome {
    if ids.is_null() && count > 0 {
        return Err(Code::BAD_ARGUMENT);
    }
    let all = all();
    for number in 0..count as usize {
        // SAFETY: the caller passes `count` numbers.
        let id = unsafe { ids.add(number).read() };
        let vcpu = all.get(id as usize).and_then(Option::as_ref);
        let vcpu = vcpu.ok_or(Code::BAD_ARGUMENT)?;
        vcpu.canceled.store(true, Ordering::SeqCst);
        vcpu.attention.store(true, Ordering::SeqCst);
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hv_vcpu_config_create() -> *mut c_void {
    answer_object("hv_vcpu_config_create", || {
        Some(objects::create(Object::VcpuConfig))
    })
}

framework! {
    fn hv_vm_get_max_vcpu_count(count: *mut u32) {
        give(count, MAX_VCPUS as u32)
    }

    fn hv_vcpu_create(id: *mut u64, exit: *mut *const VcpuExit, config: *mut c_void) {
        create(id, exit, config)
    }

    fn hv_vcpu_destroy(id: u64) {
        destroy(id)
    }

    fn hv_vcpu_run(id: u64) {
        own(id, run)
    }

    fn hv_vcpus_exit(ids: *const u64, count: u32) {
        request_exits(ids, count)
    }

    fn hv_vcpu_get_exec_time(id: u64, time: *mut u64) {
        own(id, |vcpu| give(time, vcpu.emulation.executed().as_nanos() as u64))
    }

    fn hv_vcpu_get_trap_debug_exceptions(id: u64, trap: *mut bool) {
        own(id, |vcpu| give(trap, vcpu.trap_debug_exceptions))
    }

    fn hv_vcpu_set_trap_debug_exceptions(id: u64, trap: bool) {
        own(id, |vcpu| {
            vcpu.trap_debug_exceptions = trap;
            vcpu.emulation.trap_breakpoints(trap);
            Ok(())
        })
    }

    fn hv_vcpu_get_trap_debug_reg_accesses(id: u64, trap: *mut bool) {
        own(id, |vcpu| give(trap, vcpu.trap_debug_reg_accesses))
    }

    fn hv_vcpu_set_trap_debug_reg_accesses(id: u64, trap: bool) {
        own(id, |vcpu| {
            vcpu.trap_debug_reg_accesses = trap;
            Ok(())
        })
    }
}
