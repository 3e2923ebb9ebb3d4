//! The machine of the framework, and the objects with which it is created.

#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use applevisor_sys::{hv_error_t, hv_return_t, hv_vm_create, hv_vm_destroy, os_release};

use super::errors::HvError;

/// The machine.
#[derive(Debug)]
pub(crate) enum Machine {
    /// It ends when this is dropped.
    Created,
    /// It exists while its owner does.
    Adopted(#[allow(dead_code, reason = "held until it is dropped")] Arc<dyn Any + Send + Sync>),
}

impl Machine {
    /// Creates the machine. Without a configuration, it has the defaults.
    pub(super) fn create(config: Option<&Object>) -> Result<Arc<Self>, HvError> {
        let config = config.map_or(ptr::null_mut(), Object::as_ptr);
        // SAFETY: the configuration is null or one of `hv_vm_config_create`.
        HvError::check("hv_vm_create", unsafe { hv_vm_create(config) })?;
        Ok(Arc::new(Self::Created))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if matches!(self, Self::Adopted(_)) {
            return;
        }
        // SAFETY: this is the last use of the machine. If the call fails, the machine continues to
        // exist, and creating the next one returns an error.
        let _ = unsafe { hv_vm_destroy() };
    }
}

/// The machine, and whether it has an interrupt controller of the framework.
#[derive(Clone, Debug)]
pub(crate) enum Instance {
    Plain(#[allow(dead_code, reason = "held until it is dropped")] Arc<Machine>),
    #[cfg(feature = "macos-15")]
    Gic(#[allow(dead_code, reason = "held until it is dropped")] GicInstance),
}

/// An object of the framework, which is released when this is dropped.
#[derive(Debug)]
pub(crate) struct Object(NonNull<c_void>);

impl Object {
    /// Takes the object that `create` returned.
    ///
    /// # Safety
    /// `create` returns an object that the caller releases, or null.
    pub(super) unsafe fn create(
        call: &'static str,
        create: unsafe extern "C" fn() -> *mut c_void,
    ) -> Result<Self, HvError> {
        // SAFETY: the caller upholds that the function takes no arguments and returns an object.
        let object = NonNull::new(unsafe { create() });
        // The function has no code for why it returned none.
        let code = hv_error_t::HV_NO_RESOURCES as hv_return_t;
        object.map(Self).ok_or(HvError { call, code })
    }

    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.0.as_ptr()
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the object was created by `create` and is released once.
        unsafe { os_release(self.as_ptr()) };
    }
}

#[cfg(feature = "macos-15")]
pub(crate) use gic::GicInstance;

#[cfg(feature = "macos-15")]
mod gic {
    use super::super::create_error::CreateVmError;
    use super::super::gic_place::{GicPlace, MsiRegion};
    use super::super::newer;
    use super::*;

    /// A machine with an interrupt controller of the framework.
    #[derive(Clone, Debug)]
    pub(crate) struct GicInstance(#[allow(dead_code, reason = "held until dropped")] Arc<Machine>);

    impl GicInstance {
        /// Returns a machine that has an interrupt controller.
        pub(crate) fn adopted(machine: Arc<Machine>) -> Self {
            Self(machine)
        }

        /// Adds the interrupt controller. The machine has no vCPU yet.
        pub(crate) fn create(
            machine: Arc<Machine>,
            place: GicPlace,
            msis: Option<MsiRegion>,
        ) -> Result<Self, CreateVmError> {
            let create = newer::hv_gic_config_create()?;
            // SAFETY: the function returns a new object.
            let config = unsafe { Object::create("hv_gic_config_create", create) }?;
            let set = newer::hv_gic_config_set_distributor_base()?;
            // SAFETY: the configuration exists.
            let code = unsafe { set(config.as_ptr(), place.distributor) };
            HvError::check("hv_gic_config_set_distributor_base", code)?;
            let set = newer::hv_gic_config_set_redistributor_base()?;
            // SAFETY: the configuration exists.
            let code = unsafe { set(config.as_ptr(), place.redistributors) };
            HvError::check("hv_gic_config_set_redistributor_base", code)?;
            if let Some(region) = msis {
                let set = newer::hv_gic_config_set_msi_region_base()?;
                // SAFETY: the configuration exists.
                let code = unsafe { set(config.as_ptr(), region.address) };
                HvError::check("hv_gic_config_set_msi_region_base", code)?;
                let set = newer::hv_gic_config_set_msi_interrupt_range()?;
                // SAFETY: the configuration exists.
                let code = unsafe { set(config.as_ptr(), region.first_intid, region.count) };
                HvError::check("hv_gic_config_set_msi_interrupt_range", code)?;
            }
            let create = newer::hv_gic_create()?;
            // SAFETY: the machine and the configuration exist.
            HvError::check("hv_gic_create", unsafe { create(config.as_ptr()) })?;
            Ok(Self(machine))
        }
    }
}
