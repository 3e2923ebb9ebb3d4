//! What tests set and ask: failures, the host's properties, and what the framework holds.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use crate::host::{
    NOT_ENTITLED, exit_with, keep, set_hypervisor, set_identification, set_max_address_bits,
    set_sme, stop_clock,
};
pub use crate::memory::Mapped;
pub use crate::systems::System;
use crate::{calls, host, machine, memory, objects, systems, vcpus};

/// Serializes the tests of a program, because a process has one machine. [Resets](reset) what an
/// earlier test has set.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    reset();
    turn
}

/// Makes call `number` of the function `name` fail with `code`, counted from now on. The first call
/// is 1.
pub fn fail(name: &str, number: u64, code: calls::Code) {
    calls::fail(name, number, number, code);
}

/// Makes call `number` of the function `name`, and all later ones, fail with `code`.
pub fn fail_from(name: &str, number: u64, code: calls::Code) {
    calls::fail(name, number, u64::MAX, code);
}

/// Returns how often each function was called since the last [`reset`].
#[must_use]
pub fn counts() -> BTreeMap<&'static str, u64> {
    calls::counts()
}

/// Sets the version of macOS. `dlsym` finds no function of a later one, and calling one ends the
/// process.
pub fn set_system(system: System) {
    systems::set(system);
}

/// Returns the memory that is mapped into the guest.
#[must_use]
pub fn mapped() -> Vec<Mapped> {
    memory::mapped()
}

/// Returns the number of objects that the caller has not released.
#[must_use]
pub fn objects() -> usize {
    objects::count()
}

/// Returns whether a vCPU exists, also one whose thread has ended.
#[must_use]
pub fn has_vcpu() -> bool {
    vcpus::exist()
}

/// Returns whether a vCPU waits for an interrupt inside `hv_vcpu_run`.
#[must_use]
pub fn has_waiting_vcpu() -> bool {
    vcpus::waits()
}

/// Ends the machine and all that is in it, as the end of a process does, and forgets all calls,
/// failures and settings.
///
/// # Panics
/// Panics if a thread has a vCPU. Only that thread can destroy it.
pub fn reset() {
    vcpus::clear();
    memory::clear();
    machine::clear();
    objects::clear();
    calls::clear();
    host::clear();
    set_system(System::MacOs26);
}
