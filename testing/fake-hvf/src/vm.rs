//! Creating and ending the machine of this process, and its configuration.

use std::ffi::c_void;

use crate::calls::{Code, Outcome, answer_object, framework, give};
use crate::machine::{self, Machine};
use crate::{host, memory, objects, vcpus};

/// `hv_ipa_granule_t`
const GRANULE_4K: u32 = 0;
const GRANULE_16K: u32 = 1;

const DEFAULT_ADDRESS_BITS: u32 = 36;

/// The settings of a machine (`hv_vm_config_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    address_bits: u32,
    granule: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address_bits: DEFAULT_ADDRESS_BITS,
            granule: GRANULE_16K,
        }
    }
}

fn create(settings: *mut c_void) -> Outcome {
    if !host::is_entitled() {
        return Err(Code::DENIED);
    }
    let settings = match settings.is_null() {
        true => Config::default(),
        false => objects::with(settings, |config: &mut Config| *config)?,
    };
    let mut machine = machine::lock();
    if machine.is_some() {
        return Err(Code::BUSY);
    }
    *machine = Some(Machine {
        address_bits: settings.address_bits,
        granule: if settings.granule == GRANULE_4K {
            4 << 10
        } else {
            16 << 10
        },
        has_run: false,
        gic: None,
    });
    Ok(())
}

/// The framework's header leaves open what becomes of mappings and vCPUs. Here they are in the way.
fn destroy() -> Outcome {
    let mut machine = machine::lock();
    if machine.is_none() {
        return Err(Code::NO_DEVICE);
    }
    if vcpus::exist() || memory::is_mapped() {
        return Err(Code::BUSY);
    }
    *machine = None;
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hv_vm_config_create() -> *mut c_void {
    answer_object("hv_vm_config_create", || {
        Some(objects::create(Config::default()))
    })
}

framework! {
    fn hv_vm_create(config: *mut c_void) {
        create(config)
    }

    fn hv_vm_destroy() {
        destroy()
    }

    fn hv_vm_config_get_max_ipa_size(bits: *mut u32) {
        give(bits, host::max_address_bits())
    }

    fn hv_vm_config_get_default_ipa_size(bits: *mut u32) {
        give(bits, DEFAULT_ADDRESS_BITS)
    }

    fn hv_vm_config_set_ipa_size(settings: *mut c_void, bits: u32) {
        if bits == 0 {
            return Err(Code::BAD_ARGUMENT);
        }
        if bits > host::max_address_bits() {
            return Err(Code::UNSUPPORTED);
        }
        objects::with(settings, |config: &mut Config| config.address_bits = bits)
    }

    fn hv_vm_config_get_ipa_size(settings: *mut c_void, bits: *mut u32) {
        give(bits, objects::with(settings, |config: &mut Config| config.address_bits)?)
    }

    fn hv_vm_config_get_el2_supported(supported: *mut bool) {
        give(supported, false)
    }

    fn hv_vm_config_get_el2_enabled(settings: *mut c_void, enabled: *mut bool) {
        objects::with(settings, |_: &mut Config| ())?;
        give(enabled, false)
    }

    fn hv_vm_config_set_el2_enabled(settings: *mut c_void, enabled: bool) {
        objects::with(settings, |_: &mut Config| ())?;
        if enabled { Err(Code::UNSUPPORTED) } else { Ok(()) }
    }

    fn hv_vm_config_get_default_ipa_granule(granule: *mut u32) {
        give(granule, GRANULE_16K)
    }

    fn hv_vm_config_get_ipa_granule(settings: *mut c_void, granule: *mut u32) {
        give(granule, objects::with(settings, |config: &mut Config| config.granule)?)
    }

    fn hv_vm_config_set_ipa_granule(settings: *mut c_void, granule: u32) {
        if granule != GRANULE_4K && granule != GRANULE_16K {
            return Err(Code::BAD_ARGUMENT);
        }
        objects::with(settings, |config: &mut Config| config.granule = granule)
    }
}
