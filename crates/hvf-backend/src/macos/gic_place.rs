//! The addresses and sizes of the framework's interrupt controller.

#![allow(unsafe_code)]

use std::ops::Range;

use applevisor_sys::hv_return_t;
use thiserror::Error;

use super::errors::HvError;
use super::newer::{self, UnsupportedFunction};

/// The guest-physical addresses of the interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GicPlace {
    /// The address of the distributor, which takes [`GicSizes::distributor`].
    pub distributor: u64,
    /// The address of the redistributors, which take [`GicSizes::redistributors`]: one for each
    /// vCPU that the framework can create.
    pub redistributors: u64,
}

/// The region for message-signaled interrupts (GICv2m), for [`VmOptions::gic_msis`].
///
/// [`VmOptions::gic_msis`]: crate::VmOptions::gic_msis
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiRegion {
    /// The guest-physical address, which takes [`GicSizes::msi_region`].
    pub address: u64,
    /// The number of the first interrupt, in [`GicSizes::spis`]. No line can have it.
    pub first_intid: u32,
    /// The number of interrupts.
    pub count: u32,
}

/// The sizes and alignments of the interrupt controller in bytes, and the numbers of its
/// interrupts. Returned by [`Vm::gic_sizes`](crate::Vm::gic_sizes).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GicSizes {
    /// The size of the distributor.
    pub distributor: u64,
    /// The alignment of the distributor's address.
    pub distributor_alignment: u64,
    /// The size of the redistributor of one vCPU.
    pub redistributor: u64,
    /// The size of all redistributors.
    pub redistributors: u64,
    /// The alignment of the redistributors' address.
    pub redistributors_alignment: u64,
    /// The size of the region for messages.
    pub msi_region: u64,
    /// The alignment of the address of the region for messages.
    pub msi_region_alignment: u64,
    /// The numbers of the shared interrupts.
    pub spis: Range<u32>,
}

impl MsiRegion {
    /// Returns the address to which a device writes the number of an interrupt: that of the
    /// register GICM_SETSPI_NSR.
    #[must_use]
    pub fn doorbell(&self) -> u64 {
        self.address + applevisor_sys::hv_gic_msi_reg_t::SET_SPI_NSR as u64
    }
}

impl GicSizes {
    /// Reads the sizes from the framework.
    pub(super) fn read() -> Result<Self, GicSizesError> {
        let (mut first, mut count) = (0, 0);
        let range = newer::hv_gic_get_spi_interrupt_range()?;
        // SAFETY: both addresses are of variables.
        let code = unsafe { range(&raw mut first, &raw mut count) };
        HvError::check("hv_gic_get_spi_interrupt_range", code)?;
        Ok(Self {
            distributor: size(
                "hv_gic_get_distributor_size",
                newer::hv_gic_get_distributor_size()?,
            )?,
            distributor_alignment: size(
                "hv_gic_get_distributor_base_alignment",
                newer::hv_gic_get_distributor_base_alignment()?,
            )?,
            redistributor: size(
                "hv_gic_get_redistributor_size",
                newer::hv_gic_get_redistributor_size()?,
            )?,
            redistributors: size(
                "hv_gic_get_redistributor_region_size",
                newer::hv_gic_get_redistributor_region_size()?,
            )?,
            redistributors_alignment: size(
                "hv_gic_get_redistributor_base_alignment",
                newer::hv_gic_get_redistributor_base_alignment()?,
            )?,
            msi_region: size(
                "hv_gic_get_msi_region_size",
                newer::hv_gic_get_msi_region_size()?,
            )?,
            msi_region_alignment: size(
                "hv_gic_get_msi_region_base_alignment",
                newer::hv_gic_get_msi_region_base_alignment()?,
            )?,
            spis: first..first + count,
        })
    }
}

/// Calls a function of the framework that writes a size.
fn size(
    call: &'static str,
    get: unsafe extern "C" fn(*mut usize) -> hv_return_t,
) -> Result<u64, HvError> {
    let mut size = 0;
    // SAFETY: the address is of a variable of the type that the function writes.
    HvError::check(call, unsafe { get(&raw mut size) }).map(|()| size as u64)
}

/// An error for reading the sizes of the interrupt controller.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GicSizesError {
    /// This macOS has no interrupt controller.
    #[error("failed to read the sizes of the interrupt controller: {0}")]
    Unsupported(#[from] UnsupportedFunction),
    /// The framework refused.
    #[error("failed to read the sizes of the interrupt controller: {0}")]
    Refused(#[from] HvError),
}
