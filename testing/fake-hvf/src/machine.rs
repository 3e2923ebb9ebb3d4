//! The machine of this process.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::calls::Code;
use crate::gic_registers::Gic;

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The number of bits of guest-physical addresses.
    pub address_bits: u32,
    /// The page size of stage 2 in bytes.
    pub granule: u64,
    /// Whether a vCPU has run.
    pub has_run: bool,
    pub gic: Option<Gic>,
}

static MACHINE: Mutex<Option<Machine>> = Mutex::new(None);

pub(crate) fn lock() -> MutexGuard<'static, Option<Machine>> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `function` with the machine. Without one, there is no device.
pub(crate) fn with<T>(function: impl FnOnce(&mut Machine) -> Result<T, Code>) -> Result<T, Code> {
    function(lock().as_mut().ok_or(Code::NO_DEVICE)?)
}

/// Calls `function` with the interrupt controller, if the machine has one.
pub(crate) fn with_gic<T>(function: impl FnOnce(&mut Gic) -> Result<T, Code>) -> Result<T, Code> {
    with(|machine| function(machine.gic.as_mut().ok_or(Code::UNSUPPORTED)?))
}

/// Returns whether the machine has an interrupt controller.
pub(crate) fn has_gic() -> bool {
    with_gic(|_| Ok(())).is_ok()
}

/// Ends the machine, also if memory is mapped or a vCPU exists.
pub(crate) fn clear() {
    *lock() = None;
}
