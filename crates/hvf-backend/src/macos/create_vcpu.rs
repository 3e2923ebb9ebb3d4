//! Creating a vCPU, with the registers by which the guest finds out what the CPU has.

use applevisor_sys::hv_sys_reg_t;
use thiserror::Error;

use super::errors::HvError;
use super::registers;
use super::vcpu::Vcpu;
use super::vm::Vm;
use crate::cpu_features::{CpuFeatures, MissingFeature, listed};
use crate::state::Encoding;

/// The sizes of physical addresses in bits, by their number in bits 3 to 0 (Arm ARM,
/// ID_AA64MMFR0_EL1.PARange).
const ADDRESS_BITS: [u32; 8] = [32, 36, 40, 42, 44, 48, 52, 56];

const PA_RANGE: u64 = 0xf;

/// Bits 27 to 24 (Arm ARM, ID_AA64PFR1_EL1.SME).
const SME: u64 = 0xf << 24;

impl Vm {
    /// Creates a vCPU, which belongs to this thread.
    ///
    /// It reports no more physical address bits than the machine has (ID_AA64MMFR0_EL1.PARange),
    /// and no scalable matrix extension (ID_AA64PFR1_EL1.SME), unless the machine was created with
    /// `Vm::options().sme(true)`.
    ///
    /// With [`VmOptions::cpu_features`](crate::VmOptions::cpu_features), it reports exactly these.
    ///
    /// # Errors
    /// Returns [`CreateVcpuError`], for example if the framework has no more vCPUs
    /// (`HV_NO_RESOURCES`), or if this thread already has one (`HV_BUSY`).
    pub fn create_vcpu(&self) -> Result<Vcpu, CreateVcpuError> {
        let vcpu = Vcpu::create(self)?;
        limit(&vcpu)?;
        if let Some(features) = &self.cpu_features {
            apply(&vcpu, features)?;
        }
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

/// Makes a new vCPU report these features.
fn apply(vcpu: &Vcpu, features: &CpuFeatures) -> Result<(), CreateVcpuError> {
    let own = vcpu.cpu_features()?;
    let missing = own.lacks(features);
    if !missing.is_empty() {
        return Err(CreateVcpuError::MissingFeatures { missing });
    }
    for (encoding, value) in features.registers() {
        // A register that this system does not have, of which nothing is needed.
        if own.value(encoding).is_none_or(|own| own == value) {
            continue;
        }
        let Some(register) = registers::by_encoding(encoding.0) else {
            continue;
        };
        vcpu.set_system_register(register, value)?;
        let found = vcpu.system_register(register)?;
        if found != value {
            return Err(CreateVcpuError::NotTaken {
                register: encoding,
                written: value,
                found,
            });
        }
    }
    Ok(())
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

/// An error for creating a vCPU. It does not exist.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CreateVcpuError {
    /// The CPU lacks features of `VmOptions::cpu_features`.
    #[error(
        "this Mac lacks CPU features of the machine ({}): include this Mac's own features in the \
         intersection (`CpuFeatures::intersect`)",
        listed(.missing)
    )]
    MissingFeatures {
        /// The features, at least one.
        missing: Vec<MissingFeature>,
    },
    /// The framework ignored a value of `VmOptions::cpu_features`.
    #[error(
        "{register} was set to {written:#x}, but reads {found:#x}: this macOS does not hide such \
         CPU features"
    )]
    NotTaken {
        /// The register.
        register: Encoding,
        /// The written value.
        written: u64,
        /// The value that was read back.
        found: u64,
    },
    /// The framework refused.
    #[error("failed to create a vCPU: {0}")]
    Refused(#[from] HvError),
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
