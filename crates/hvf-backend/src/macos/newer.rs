//! The framework's functions that are newer than macOS 12, looked up when they are called.
//!
//! A program that imports a function that its system does not have ends in the dynamic linker,
//! before `main`. These functions are therefore found by `dlsym`, and one program runs on all
//! systems.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};

#[cfg(feature = "macos-15")]
use applevisor_sys::{hv_gic_config_t, hv_gic_icc_reg_t, hv_gic_state_t, hv_ipa_t};
use applevisor_sys::{
    hv_ipa_granule_t, hv_return_t, hv_vcpu_sme_state_t, hv_vcpu_t, hv_vm_config_t,
};
use thiserror::Error;

/// A function of the framework that this system does not have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("this macOS has no {function}, which macOS {since} and later have")]
#[non_exhaustive]
pub struct UnsupportedFunction {
    /// The name of the C function.
    pub function: &'static str,
    /// The first macOS that has it.
    pub since: &'static str,
}

/// Defines a function that looks up each function, by the header that declares it and the macOS of
/// its `API_AVAILABLE`.
macro_rules! functions {
    ($(
        #[header = $header:literal, since = $since:literal]
        $(fn $name:ident($($type:ty),*) -> $result:ty;)*
    )*) => {$($(
        #[doc = concat!("`Hypervisor/", $header, "`, macOS ", $since)]
        pub(super) fn $name()
        -> Result<unsafe extern "C" fn($($type),*) -> $result, UnsupportedFunction> {
            const NAME: &CStr = match CStr::from_bytes_with_nul(
                concat!(stringify!($name), "\0").as_bytes(),
            ) {
                Ok(name) => name,
                Err(_) => panic!("a name has no zero byte"),
            };
            // SAFETY: the name ends with a zero byte.
            let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, NAME.as_ptr()) };
            if address.is_null() {
                return Err(UnsupportedFunction {
                    function: stringify!($name),
                    since: $since,
                });
            }
            // SAFETY: this is the type of the function in the header.
            Ok(unsafe {
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $result>(
                    address,
                )
            })
        }
    )*)*};
}

functions! {
    #[header = "hv_vm_config.h", since = "13.0"]
    fn hv_vm_config_create() -> hv_vm_config_t;
    fn hv_vm_config_get_max_ipa_size(*mut u32) -> hv_return_t;
    fn hv_vm_config_get_default_ipa_size(*mut u32) -> hv_return_t;
    fn hv_vm_config_set_ipa_size(hv_vm_config_t, u32) -> hv_return_t;

    #[header = "hv_vm_config.h", since = "26.0"]
    fn hv_vm_config_set_ipa_granule(hv_vm_config_t, hv_ipa_granule_t) -> hv_return_t;

    #[header = "hv_sme_config.h", since = "15.2"]
    fn hv_sme_config_get_max_svl_bytes(*mut usize) -> hv_return_t;

    #[header = "hv_vcpu.h", since = "15.2"]
    fn hv_vcpu_get_sme_state(hv_vcpu_t, *mut hv_vcpu_sme_state_t) -> hv_return_t;
    fn hv_vcpu_set_sme_state(hv_vcpu_t, *const hv_vcpu_sme_state_t) -> hv_return_t;
    fn hv_vcpu_get_sme_z_reg(hv_vcpu_t, u32, *mut u8, usize) -> hv_return_t;
    fn hv_vcpu_set_sme_z_reg(hv_vcpu_t, u32, *const u8, usize) -> hv_return_t;
    fn hv_vcpu_get_sme_p_reg(hv_vcpu_t, u32, *mut u8, usize) -> hv_return_t;
    fn hv_vcpu_set_sme_p_reg(hv_vcpu_t, u32, *const u8, usize) -> hv_return_t;
    fn hv_vcpu_get_sme_za_reg(hv_vcpu_t, *mut u8, usize) -> hv_return_t;
    fn hv_vcpu_set_sme_za_reg(hv_vcpu_t, *const u8, usize) -> hv_return_t;
    fn hv_vcpu_get_sme_zt0_reg(hv_vcpu_t, *mut u8) -> hv_return_t;
    fn hv_vcpu_set_sme_zt0_reg(hv_vcpu_t, *const u8) -> hv_return_t;
}

#[cfg(feature = "macos-15")]
functions! {
    #[header = "hv_gic_config.h", since = "15.0"]
    fn hv_gic_config_create() -> hv_gic_config_t;
    fn hv_gic_config_set_distributor_base(hv_gic_config_t, hv_ipa_t) -> hv_return_t;
    fn hv_gic_config_set_redistributor_base(hv_gic_config_t, hv_ipa_t) -> hv_return_t;
    fn hv_gic_config_set_msi_region_base(hv_gic_config_t, hv_ipa_t) -> hv_return_t;
    fn hv_gic_config_set_msi_interrupt_range(hv_gic_config_t, u32, u32) -> hv_return_t;

    #[header = "hv_gic.h", since = "15.0"]
    fn hv_gic_create(hv_gic_config_t) -> hv_return_t;
    fn hv_gic_get_icc_reg(hv_vcpu_t, hv_gic_icc_reg_t, *mut u64) -> hv_return_t;
    fn hv_gic_set_icc_reg(hv_vcpu_t, hv_gic_icc_reg_t, u64) -> hv_return_t;
    fn hv_gic_set_spi(u32, bool) -> hv_return_t;
    fn hv_gic_send_msi(hv_ipa_t, u32) -> hv_return_t;
    fn hv_gic_reset() -> hv_return_t;
    fn hv_gic_set_state(*const c_void, usize) -> hv_return_t;

    #[header = "hv_gic_parameters.h", since = "15.0"]
    fn hv_gic_get_distributor_size(*mut usize) -> hv_return_t;
    fn hv_gic_get_distributor_base_alignment(*mut usize) -> hv_return_t;
    fn hv_gic_get_redistributor_size(*mut usize) -> hv_return_t;
    fn hv_gic_get_redistributor_region_size(*mut usize) -> hv_return_t;
    fn hv_gic_get_redistributor_base_alignment(*mut usize) -> hv_return_t;
    fn hv_gic_get_msi_region_size(*mut usize) -> hv_return_t;
    fn hv_gic_get_msi_region_base_alignment(*mut usize) -> hv_return_t;
    fn hv_gic_get_spi_interrupt_range(*mut u32, *mut u32) -> hv_return_t;

    #[header = "hv_gic_state.h", since = "15.0"]
    fn hv_gic_state_create() -> hv_gic_state_t;
    fn hv_gic_state_get_size(hv_gic_state_t, *mut usize) -> hv_return_t;
    fn hv_gic_state_get_data(hv_gic_state_t, *mut c_void) -> hv_return_t;
}
