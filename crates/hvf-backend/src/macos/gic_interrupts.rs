//! Interrupts of devices, and the reset of the framework's interrupt controller.

#![allow(unsafe_code)]

use super::errors::HvError;
use super::gic::GicError;
use super::newer;
use super::vm::{Instance, Vm};

impl Vm {
    /// Sets the level of the line of a shared interrupt. Any thread may call this.
    ///
    /// `intid` is the number in the interrupt controller, from 32 on. An interrupt that is
    /// triggered by edges becomes pending at each call with `true`.
    ///
    /// A pending interrupt is part of the [captured state](Vm::capture_gic). After a restore, set
    /// the level of each level-triggered line again: Apple does not document whether the state has
    /// the levels, and a level that is set twice is the same level.
    ///
    /// # Errors
    /// Returns [`GicError`] if the machine has no interrupt controller, or if `intid` is not in
    /// [`GicSizes::spis`](crate::GicSizes::spis) or is a message's.
    pub fn set_spi(&self, intid: u32, level: bool) -> Result<(), GicError> {
        self.check_gic()?;
        let set = newer::hv_gic_set_spi().map_err(HvError::missing)?;
        // SAFETY: the machine exists. Any thread may make this call.
        Ok(HvError::check("hv_gic_set_spi", unsafe {
            set(intid, level)
        })?)
    }

    /// Sends a message-signaled interrupt. Any thread may call this.
    ///
    /// `address` and `intid` are what the guest has configured the device to write:
    /// [`MsiRegion::doorbell`](crate::MsiRegion::doorbell) and the number of the interrupt.
    ///
    /// # Errors
    /// Returns [`GicError`] if the machine has no interrupt controller or no such
    /// [region](crate::VmOptions::gic_msis), or if `intid` is not in it.
    pub fn send_msi(&self, address: u64, intid: u32) -> Result<(), GicError> {
        self.check_gic()?;
        let send = newer::hv_gic_send_msi().map_err(HvError::missing)?;
        // SAFETY: the machine exists. Any thread may make this call.
        Ok(HvError::check("hv_gic_send_msi", unsafe {
            send(address, intid)
        })?)
    }

    /// Resets the distributor and all redistributors, as part of a reset of the whole machine.
    /// Every vCPU must be stopped.
    ///
    /// # Errors
    /// Returns [`GicError`] if the machine has no interrupt controller or the framework refuses.
    pub fn reset_gic(&self) -> Result<(), GicError> {
        self.check_gic()?;
        let reset = newer::hv_gic_reset().map_err(HvError::missing)?;
        // SAFETY: the machine exists.
        Ok(HvError::check("hv_gic_reset", unsafe { reset() })?)
    }

    /// Fails if the machine has no interrupt controller.
    pub(super) fn check_gic(&self) -> Result<(), GicError> {
        match &self.instance {
            Instance::Gic(_) => Ok(()),
            Instance::Plain(_) => Err(GicError::NoGic),
        }
    }
}
