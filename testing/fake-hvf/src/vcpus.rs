//! What all threads see of the vCPUs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::calls::Code;
use crate::gic_registers::Registers;

/// The number of vCPUs of a machine.
pub(crate) const MAX_VCPUS: usize = 16;

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
    /// Translations of addresses are to be forgotten.
    pub stale_translations: AtomicBool,
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
    pub orphaned: AtomicBool,
}

impl Shared {
    pub(crate) fn cpu_interface(&self) -> MutexGuard<'_, BTreeMap<u16, u64>> {
        let interface = self.cpu_interface.lock();
        interface.unwrap_or_else(PoisonError::into_inner)
    }
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

/// Adds a vCPU with the first free number, and returns the number.
pub(crate) fn add(vcpu: Arc<Shared>) -> Result<u64, Code> {
    let mut all = all();
    let number = match all.iter().position(Option::is_none) {
        Some(free) => free,
        None if all.len() < MAX_VCPUS => {
            all.push(None);
            all.len() - 1
        }
        None => return Err(Code::NO_RESOURCES),
    };
    all[number] = Some(vcpu);
    Ok(number as u64)
}

/// Removes a vCPU.
pub(crate) fn remove(number: u64) {
    all()[number as usize] = None;
}

/// Asks a vCPU to exit.
pub(crate) fn request_exit(number: u64) -> Result<(), Code> {
    let all = all();
    let vcpu = all.get(number as usize).and_then(Option::as_ref);
    let vcpu = vcpu.ok_or(Code::BAD_ARGUMENT)?;
    vcpu.canceled.store(true, Ordering::SeqCst);
    vcpu.attention.store(true, Ordering::SeqCst);
    Ok(())
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

/// Makes each vCPU forget its translations of addresses before it uses one again.
pub(crate) fn forget_translations() {
    for vcpu in each() {
        vcpu.stale_translations.store(true, Ordering::SeqCst);
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
