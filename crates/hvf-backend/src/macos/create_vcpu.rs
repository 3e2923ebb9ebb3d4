//! Creating a vCPU, with the registers by which the guest finds out what the CPU has.

use applevisor_sys::hv_sys_reg_t;

use super::errors::HvError;
use super::vcpu::Vcpu;
use super::vm::Vm;

/// The sizes of physical addresses in bits, by their number in ID_AA64MMFR0_EL1.PARange, bits 3 to
/// 0 (Arm ARM, D24.2).
const ADDRESS_BITS: [u32; 8] = [32, 36, 40, 42, 44, 48, 52, 56];

const PA_RANGE: u64 = 0xf;

/// ID_AA64PFR1_EL1.SME (Arm ARM, D24.2).
const SME: u64 = 0xf << 24;

impl Vm {
    /// Creates a vCPU, which belongs to this thread.
    ///
    /// It reports no more physical address bits than the machine has (ID_AA64MMFR0_EL1.PARange),
    /// and no scalable matrix extension (ID_AA64PFR1_EL1.SME), unless the machine was created with
    /// `Vm::options().sme(true)`.
    ///
    /// # Errors
    /// Returns [`HvError`] if the framework has no more vCPUs (`HV_NO_RESOURCES`), or if this
    /// thread already has one (`HV_BUSY`).
    pub fn create_vcpu(&self) -> Result<Vcpu, HvError> {
        let vcpu = Vcpu::create(self)?;
        limit(&vcpu)?;
        Ok(vcpu)
    }
}

/// Limits the registers of a new vCPU to what its machine has.
///
/// The framework reports the address bits of the CPU, also where the machine has fewer.
fn limit(vcpu: &Vcpu) -> Result<(), HvError> {
    let machine = pa_range(vcpu.vm.address_bits());
    change(vcpu, hv_sys_reg_t::ID_AA64MMFR0_EL1, |value| {
        value & !PA_RANGE | (value & PA_RANGE).min(machine)
    })?;
    if vcpu.vm.sme {
        return Ok(());
    }
    change(vcpu, hv_sys_reg_t::ID_AA64PFR1_EL1, |value| value & !SME)
}

/// Changes a register, unless it already has the new value.
fn change(
    vcpu: &Vcpu,
    register: hv_sys_reg_t,
    new: impl FnOnce(u64) -> u64,
) -> Result<(), HvError> {
    let value = vcpu.system_register(register)?;
    match new(value) {
        same if same == value => Ok(()),
        new => vcpu.set_system_register(register, new),
    }
}

/// Returns the largest number of PARange with at most `bits` bits.
fn pa_range(bits: u32) -> u64 {
    let within = ADDRESS_BITS.iter().take_while(|known| **known <= bits);
    within.count().saturating_sub(1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_the_range_is_rounded_down() {
        let ranges = [31, 32, 35, 36, 39, 40, 41, 42, 43, 44, 48, 52, 56, 64].map(pa_range);
        assert_eq!(ranges, [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7]);
    }
}
