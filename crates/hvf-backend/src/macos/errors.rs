//! The errors of the framework's calls, and of capturing and restoring a vCPU.

use applevisor_sys::{hv_error_t, hv_return_t};
use thiserror::Error;

use super::newer::UnsupportedFunction;
use crate::cpu_features::{MissingFeature, listed};
use crate::state::Encoding;

/// An error of a call to the framework.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{call} failed with {} ({:#x})", self.name(), self.code)]
#[non_exhaustive]
pub struct HvError {
    /// The name of the C function.
    pub call: &'static str,
    /// The code that the framework returned (`hv_return_t`).
    pub code: i32,
}

/// The framework's codes and their names, from `Hypervisor/hv_error.h`.
const NAMES: [(hv_error_t, &str); 9] = [
    (hv_error_t::HV_ERROR, "HV_ERROR"),
    (hv_error_t::HV_BUSY, "HV_BUSY"),
    (hv_error_t::HV_BAD_ARGUMENT, "HV_BAD_ARGUMENT"),
    (hv_error_t::HV_ILLEGAL_GUEST_STATE, "HV_ILLEGAL_GUEST_STATE"),
    (hv_error_t::HV_NO_RESOURCES, "HV_NO_RESOURCES"),
    (hv_error_t::HV_NO_DEVICE, "HV_NO_DEVICE"),
    (hv_error_t::HV_DENIED, "HV_DENIED"),
    (hv_error_t::HV_FAULT, "HV_FAULT"),
    (hv_error_t::HV_UNSUPPORTED, "HV_UNSUPPORTED"),
];

impl HvError {
    /// Converts the return code of a call to a result.
    pub(crate) fn check(call: &'static str, code: hv_return_t) -> Result<(), Self> {
        match code {
            0 => Ok(()),
            code => Err(Self { call, code }),
        }
    }

    /// Returns the error for a function that this system lacks, although it has what the function
    /// belongs to.
    #[cfg(feature = "macos-15")]
    pub(crate) fn missing(missing: UnsupportedFunction) -> Self {
        Self {
            call: missing.function,
            code: hv_error_t::HV_UNSUPPORTED as hv_return_t,
        }
    }

    /// Returns whether the code is that of `error`.
    pub(crate) fn is(&self, error: hv_error_t) -> bool {
        self.code == error as hv_return_t
    }

    fn name(&self) -> &'static str {
        let known = NAMES.iter().find(|(error, _)| self.is(*error));
        known.map_or("an unknown error", |(_, name)| name)
    }
}

/// An error for capturing the state of a vCPU. No part of the state is returned.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The framework refused to read a register that every vCPU should have.
    #[error("failed to read {register}, without which the guest could not resume: {source}")]
    Register {
        /// The name of the register.
        register: String,
        /// The error of the framework.
        #[source]
        source: HvError,
    },
    /// The guest uses the scalable matrix extension, whose state this macOS can't save.
    #[error(
        "the guest uses SME (CPACR_EL1.SMEN), whose registers this macOS can't save: update \
         macOS, or create the machine without `Vm::options().sme(true)`: {0}"
    )]
    Sme(#[source] UnsupportedFunction),
    /// The state needs a function that this macOS does not have.
    #[error("failed to capture the state of a vCPU: {0}")]
    Unsupported(#[from] UnsupportedFunction),
    /// The framework refused.
    #[error("failed to capture the state of a vCPU: {0}")]
    Refused(#[from] HvError),
}

/// An error for restoring the state of a vCPU. The vCPU is unusable.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The state has a register unknown to this version of the crate.
    #[error(
        "the state has the register {0}, which is unknown to this build: use the version of \
         hvf-backend that captured it, or the feature `macos-15`"
    )]
    UnknownRegister(Encoding),
    /// The state has a register whose name is unknown to this version of the crate.
    #[error(
        "the state has the register {0:?}, whose name is unknown: use the version of hvf-backend \
         that captured it"
    )]
    UnknownName(String),
    /// The guest was promised features that this CPU, or this machine, does not have.
    #[error(
        "this Mac lacks CPU features that the guest was promised ({}): restore it on a Mac that has \
         them, or create guests with the features of all Macs (`VmOptions::cpu_features`)",
        listed(.missing)
    )]
    MissingFeatures {
        /// The features, at least one.
        missing: Vec<MissingFeature>,
    },
    /// The state has registers of the scalable matrix extension in another number than the CPU.
    #[error(
        "the SME state has too few or too many Z or P registers: restore it as it was captured"
    )]
    SmeRegisters,
    /// A register of the scalable matrix extension has another size on this CPU.
    #[error(
        "the state has {captured} bytes of {register}, but it has {size} bytes on this Mac: \
         restore the guest on a Mac with the vector length of the captured one"
    )]
    SmeSize {
        /// The name of the register.
        register: String,
        /// The number of bytes in the state.
        captured: usize,
        /// The number of bytes on this CPU.
        size: usize,
    },
    /// A register of the scalable matrix extension that was read back differs from the written
    /// value.
    #[error("{register} reads another value than was written: restore into a new vCPU")]
    SmeNotTaken {
        /// The name of the register.
        register: String,
    },
    /// The state needs a function that this macOS does not have.
    #[error("failed to restore the state of a vCPU: {0}")]
    Unsupported(#[from] UnsupportedFunction),
    /// The framework refused a register, or its value.
    #[error("failed to restore {register} to its captured value: {source}")]
    Register {
        /// The name of the register.
        register: String,
        /// The error of the framework.
        #[source]
        source: HvError,
    },
    /// A register that was read back differs from the written value.
    #[error("{register} was set to {written:#x}, but reads {found:#x}: restore into a new vCPU")]
    NotTaken {
        /// The name of the register.
        register: String,
        /// The written value.
        written: u128,
        /// The value that was read back.
        found: u128,
    },
    /// Only one of the state and the machine has an interrupt controller.
    #[error(
        "the state was captured {} the framework's interrupt controller, but this machine was \
         created {} it: create the machine like the captured one (`Vm::options().gic(..)`)",
        if *.captured { "with" } else { "without" }, if *.captured { "without" } else { "with" }
    )]
    Gic {
        /// Whether the captured machine had an interrupt controller.
        captured: bool,
    },
    /// The machine has an interrupt controller, and this vCPU was created in another order than the
    /// captured one.
    #[error(
        "the state is of vCPU {captured} in the order of creation, but this vCPU is number \
         {found}, which has the redistributor of another vCPU: create the vCPUs in the order of \
         `creation_index` (`Vm::restore_vcpus`)"
    )]
    CreationOrder {
        /// The number of the captured vCPU.
        captured: u32,
        /// The number of the vCPU into which the state was to be restored.
        found: u32,
    },
    /// The framework refused.
    #[error("failed to restore the state of a vCPU: {0}")]
    Refused(#[from] HvError),
}
