//! The host's properties and its clock, as tests set them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The environment variable with which the process is not entitled to use the framework. Its value
/// does not matter.
pub const NOT_ENTITLED: &str = "FAKE_HVF_NOT_ENTITLED";

/// The frequency of the counter in Hz.
pub(crate) const FREQUENCY: u64 = 24_000_000;

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

/// Sets whether the host offers a hypervisor (`sysctl kern.hv_support`).
pub fn set_hypervisor(offered: bool) {
    HAS_HYPERVISOR.store(offered, Relaxed);
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

/// Makes the next exit have this reason (`hv_exit_reason_t`).
pub fn exit_with(reason: u32) {
    EXIT_REASON.store(reason.into(), Relaxed);
}

/// Forgets all settings.
pub(crate) fn clear() {
    set_hypervisor(true);
    set_max_address_bits(40);
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

/// Returns the host's counter.
pub(crate) fn ticks() -> u64 {
    let stopped = CLOCK.load(Relaxed);
    if stopped != NONE {
        return stopped;
    }
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the address is of a variable.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let (seconds, nanos) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
    seconds * FREQUENCY + nanos * 24 / 1000
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
