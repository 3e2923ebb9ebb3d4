//! What tests set and ask: failures, the host's properties, and what the framework holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use crate::memory::Mapped;
use crate::systems;
pub use crate::systems::System;
use crate::{calls, memory, objects, vcpu, vm};

/// The environment variable with which the process is not entitled to use the framework. Its value
/// does not matter.
pub const NOT_ENTITLED: &str = "FAKE_HVF_NOT_ENTITLED";

/// No reason in [`EXIT_REASON`], no time in [`CLOCK`].
const NONE: u64 = u64::MAX;

/// The host's counter where it stands still. `NONE`: it runs.
static CLOCK: AtomicU64 = AtomicU64::new(NONE);
static EXIT_REASON: AtomicU64 = AtomicU64::new(NONE);
static HAS_SME: AtomicBool = AtomicBool::new(true);
static HAS_HYPERVISOR: AtomicBool = AtomicBool::new(true);
static MAX_ADDRESS_BITS: AtomicU32 = AtomicU32::new(40);
/// The registers that keep their values.
static KEPT: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
static IDENTIFICATION: Mutex<BTreeMap<u16, u64>> = Mutex::new(BTreeMap::new());

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

/// Sets whether the host offers a hypervisor (`sysctl kern.hv_support`).
pub fn set_hypervisor(offered: bool) {
    HAS_HYPERVISOR.store(offered, Relaxed);
}

/// Sets the version of macOS. `dlsym` finds no function of a later one, and calling one ends the
/// process.
pub fn set_system(system: System) {
    systems::set(system);
}

/// Sets whether vCPUs have the scalable matrix extension, as those of an M4.
pub fn set_sme(has: bool) {
    HAS_SME.store(has, Relaxed);
}

/// Sets the value of a register that identifies the CPU, in vCPUs that are created from now on.
pub fn set_identification(register: u16, value: u64) {
    identification().insert(register, value);
}

/// Makes vCPUs ignore what is written to a register.
pub fn keep(register: u16) {
    kept().insert(register);
}

/// Sets the largest number of bits of guest-physical addresses. Older Macs have 36.
pub fn set_max_address_bits(bits: u32) {
    MAX_ADDRESS_BITS.store(bits, Relaxed);
}

/// Stops the host's counter at this number of ticks, as if the host had been restarted.
pub fn stop_clock(ticks: u64) {
    CLOCK.store(ticks, Relaxed);
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
    vcpu::exist()
}

/// Returns whether a vCPU waits for an interrupt inside `hv_vcpu_run`.
#[must_use]
pub fn has_waiting_vcpu() -> bool {
    vcpu::waits()
}

/// Makes the next exit have this reason (`hv_exit_reason_t`).
pub fn exit_with(reason: u32) {
    EXIT_REASON.store(reason.into(), Relaxed);
}

/// Ends the machine and all that is in it, as the end of a process does, and forgets all calls,
/// failures and settings.
///
/// # Panics
/// Panics if a thread has a vCPU. Only that thread can destroy it.
pub fn reset() {
    vcpu::clear();
    memory::clear();
    vm::clear();
    objects::clear();
    calls::clear();
    set_hypervisor(true);
    set_max_address_bits(40);
    set_system(System::MacOs26);
    set_sme(true);
    identification().clear();
    kept().clear();
    CLOCK.store(NONE, Relaxed);
    take_exit_reason();
}

/// Returns the reason that the next exit is to have, for once.
pub(crate) fn take_exit_reason() -> Option<u32> {
    u32::try_from(EXIT_REASON.swap(NONE, Relaxed)).ok()
}

pub(crate) fn stopped_clock() -> Option<u64> {
    let ticks = CLOCK.load(Relaxed);
    (ticks != NONE).then_some(ticks)
}

/// Returns the registers that keep their values.
pub(crate) fn kept() -> MutexGuard<'static, BTreeSet<u16>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the registers that tests have set.
pub(crate) fn identification() -> MutexGuard<'static, BTreeMap<u16, u64>> {
    IDENTIFICATION
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn is_entitled() -> bool {
    std::env::var_os(NOT_ENTITLED).is_none()
}

pub(crate) fn has_hypervisor() -> bool {
    HAS_HYPERVISOR.load(Relaxed)
}

pub(crate) fn has_sme() -> bool {
    HAS_SME.load(Relaxed)
}

pub(crate) fn max_address_bits() -> u32 {
    MAX_ADDRESS_BITS.load(Relaxed)
}
