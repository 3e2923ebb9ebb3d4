//! The errors of the framework's calls.

use applevisor::error::HypervisorError;
use applevisor_sys::{hv_error_t, hv_return_t};
use thiserror::Error;

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

    /// Returns a function that converts an error of `applevisor`, for a call made through that
    /// crate.
    pub(crate) fn in_call(call: &'static str) -> impl Fn(HypervisorError) -> Self {
        move |error| Self {
            call,
            code: error.into(),
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
