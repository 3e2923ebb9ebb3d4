//! The addresses and sizes of the framework's interrupt controller.

use std::ops::Range;

use applevisor::gic::GicConfig;

use super::errors::HvError;
use super::vm::Vm;

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
/// interrupts. Returned by [`Vm::gic_sizes`].
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

impl Vm {
    /// Returns the sizes and alignments with which a [`GicPlace`] is chosen. No machine needs to
    /// exist.
    ///
    /// # Errors
    /// Returns the [`HvError`] of the call.
    pub fn gic_sizes() -> Result<GicSizes, HvError> {
        let size = |call, get: fn() -> applevisor::error::Result<usize>| {
            let size = get().map_err(HvError::in_call(call))?;
            Ok(size as u64)
        };
        let (first, count) = GicConfig::get_spi_interrupt_range()
            .map_err(HvError::in_call("hv_gic_get_spi_interrupt_range"))?;
        Ok(GicSizes {
            distributor: size(
                "hv_gic_get_distributor_size",
                GicConfig::get_distributor_size,
            )?,
            distributor_alignment: size(
                "hv_gic_get_distributor_base_alignment",
                GicConfig::get_distributor_base_alignment,
            )?,
            redistributor: size(
                "hv_gic_get_redistributor_size",
                GicConfig::get_redistributor_size,
            )?,
            redistributors: size(
                "hv_gic_get_redistributor_region_size",
                GicConfig::get_redistributor_region_size,
            )?,
            redistributors_alignment: size(
                "hv_gic_get_redistributor_base_alignment",
                GicConfig::get_redistributor_base_alignment,
            )?,
            msi_region: size("hv_gic_get_msi_region_size", GicConfig::get_msi_region_size)?,
            msi_region_alignment: size(
                "hv_gic_get_msi_region_base_alignment",
                GicConfig::get_msi_region_base_alignment,
            )?,
            spis: first..first + count,
        })
    }
}
