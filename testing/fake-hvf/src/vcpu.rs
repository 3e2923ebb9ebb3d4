//! A vCPU: creating, running and ending it.
//!
//! A vCPU lives in a variable of its thread, so no other thread finds it.

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::calls::{Code, Outcome, answer_object, framework, give};
use crate::emulation::Emulation;
use crate::exit::{Exit, ExitException, VcpuExit};
use crate::gic_registers::new_cpu_interface;
use crate::sme::Sme;
use crate::vcpus::{self, MAX_VCPUS, Shared};
use crate::{host, machine, objects};

/// The settings of a vCPU (`hv_vcpu_config_t`).
struct Config;

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

fn create(id: *mut u64, exit: *mut *const VcpuExit, config: *mut c_void) -> Outcome {
    machine::with(|_| Ok(()))?;
    if !config.is_null() {
        objects::with(config, |_: &mut Config| ())?;
    }
    if OWN.with_borrow(Option::is_some) {
        return Err(Code::BUSY);
    }
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let shared = Arc::new(Shared {
        serial: SERIAL.fetch_add(1, Ordering::SeqCst),
        affinity: AtomicU64::new(1 << 31),
        cpu_interface: Mutex::new(new_cpu_interface()),
        ..Shared::default()
    });
    let mut vcpu = Vcpu {
        id: 0,
        emulation: Emulation::new(Arc::clone(&shared)).map_err(|_| Code::ERROR)?,
        shared: Arc::clone(&shared),
        sme: Sme::default(),
        exit: Box::default(),
        trap_debug_exceptions: false,
        trap_debug_reg_accesses: false,
    };
    give(exit, &raw const *vcpu.exit)?;
    if id.is_null() {
        return Err(Code::BAD_ARGUMENT);
    }
    vcpu.id = vcpus::add(shared)?;
    give(id, vcpu.id)?;
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
    vcpus::remove(id);
    Ok(())
}

fn run(vcpu: &mut Vcpu) -> Outcome {
    machine::with(|machine| {
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
        reason: host::take_exit_reason().unwrap_or(reason),
        exception,
    };
    Ok(())
}

fn request_exits(ids: *const u64, count: u32) -> Outcome {
    if ids.is_null() && count > 0 {
        return Err(Code::BAD_ARGUMENT);
    }
    for number in 0..count as usize {
        // SAFETY: the caller passes `count` numbers.
        vcpus::request_exit(unsafe { ids.add(number).read() })?;
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hv_vcpu_config_create() -> *mut c_void {
    answer_object("hv_vcpu_config_create", || Some(objects::create(Config)))
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
