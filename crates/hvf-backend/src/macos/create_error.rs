//! The error for creating a virtual machine.

use std::io;

use applevisor_sys::hv_error_t;
use thiserror::Error;

use super::errors::HvError;
use super::newer::UnsupportedFunction;

/// An error for a virtual machine that could not be created.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CreateVmError {
    /// The host offers no hypervisor.
    #[error(
        "this Mac offers no hypervisor (sysctl kern.hv_support is 0): if it is a virtual machine, \
         enable nested virtualization on its host"
    )]
    NoHypervisor,
    /// The support for a hypervisor could not be read.
    #[error("failed to read sysctl kern.hv_support: {0}")]
    Sysctl(#[source] io::Error),
    /// The process may not use the hypervisor.
    #[error(
        "this program may not use the hypervisor: sign it with the entitlement \
         com.apple.security.hypervisor (codesign --sign - --force --entitlements FILE PROGRAM); a \
         cargo `runner` can do this for every program that cargo runs: {0}"
    )]
    NotEntitled(#[source] HvError),
    /// The process already has a virtual machine.
    #[error(
        "this process already has a virtual machine, and the framework supports only one: drop \
         that machine, its vCPUs and its stage 2 first, or run the other guest in a process of its \
         own: {0}"
    )]
    Exists(#[source] HvError),
    /// This Mac has fewer bits of guest-physical addresses.
    #[error(
        "this Mac has guest-physical addresses of at most {max} bits, but {requested} were \
         requested: place the RAM below 2^{max}, and use at most {max} address bits"
    )]
    AddressBits {
        /// The requested number of bits.
        requested: u32,
        /// The largest number of bits on this Mac.
        max: u32,
    },
    /// This macOS does not have the function of an option.
    #[error("this macOS lacks a function of an option: omit the option, or update macOS: {0}")]
    UnsupportedFunction(#[from] UnsupportedFunction),
    /// This Mac or this version of macOS does not support an option.
    #[error(
        "this Mac does not support such a virtual machine: use fewer address bits, or omit options \
         that need a newer macOS: {0}"
    )]
    Unsupported(#[source] HvError),
    /// The framework refused for another reason.
    #[error("failed to create a virtual machine: {0}")]
    Refused(#[source] HvError),
}

impl From<HvError> for CreateVmError {
    fn from(error: HvError) -> Self {
        match error {
            error if error.is(hv_error_t::HV_DENIED) => Self::NotEntitled(error),
            error if error.is(hv_error_t::HV_BUSY) => Self::Exists(error),
            error if error.is(hv_error_t::HV_UNSUPPORTED) => Self::Unsupported(error),
            error => Self::Refused(error),
        }
    }
}
