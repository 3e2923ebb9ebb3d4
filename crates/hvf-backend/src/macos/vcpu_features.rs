//! The features that a vCPU reports to its guest.

use super::errors::{HvError, RestoreError};
use super::registers;
use super::vcpu::Vcpu;
use crate::cpu_features::{self, CpuFeatures};
use crate::state::VcpuState;

impl Vcpu {
    /// Returns the features that the vCPU reports to its guest.
    ///
    /// Those of a new vCPU are those of the Mac, limited to what the machine has: see
    /// [`Vm::create_vcpu`](crate::Vm::create_vcpu).
    ///
    /// # Errors
    /// Returns the [`HvError`] of the call.
    ///
    /// # Examples
    /// ```no_run
    /// use hvf_backend::{CpuFeatures, Vm};
    ///
    /// // On each Mac:
    /// let features = Vm::new()?.create_vcpu()?.cpu_features()?;
    /// // ... collect them in one place ...
    /// # let all = [features];
    /// let features = all.into_iter().reduce(|both, one| both.intersect(&one)).unwrap_or_default();
    /// // A machine whose guest can be restored on each of them:
    /// let vm = Vm::options().cpu_features(features).create()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cpu_features(&self) -> Result<CpuFeatures, HvError> {
        let mut found = Vec::new();
        for encoding in cpu_features::encodings() {
            let Some(register) = registers::by_encoding(encoding.0) else {
                continue;
            };
            let value = self.system_register(register);
            if !registers::is_missing(register, &value) {
                found.push((encoding, value?));
            }
        }
        Ok(CpuFeatures::new(found))
    }
}

/// Checks that a new vCPU has the features that the guest of the state was promised.
pub(super) fn check(vcpu: &Vcpu, state: &VcpuState) -> Result<(), RestoreError> {
    let missing = vcpu.cpu_features()?.lacks(&CpuFeatures::of_state(state));
    match missing[..] {
        [] => Ok(()),
        _ => Err(RestoreError::MissingFeatures { missing }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_of_features_is_one_of_the_framework() {
        let unknown = |encoding| registers::by_encoding(encoding).is_none();
        assert!(!cpu_features::encodings().any(|encoding| unknown(encoding.0)));
    }
}
