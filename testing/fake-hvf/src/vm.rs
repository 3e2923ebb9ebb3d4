//! The virtual machine of this process, and its configuration.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::calls::{Code, Outcome, answer_object, framework, give};
use crate::gic::Gic;
use crate::objects::{self, Object};
use crate::{control, memory, vcpu};

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

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The number of bits of guest-physical addresses.
    pub address_bits: u32,
    /// The page size of stage 2 in bytes.
    pub granule: u64,
    /// Whether a vCPU has run.
    pub has_run: bool,
    pub gic: Option<Gic>,
}

static MACHINE: Mutex<Option<Machine>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Machine>> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `function` with the machine. Without one, there is no device.
pub(crate) fn with<T>(function: impl FnOnce(&mut Machine) -> Result<T, Code>) -> Result<T, Code> {
    function(lock().as_mut().ok_or(Code::NO_DEVICE)?)
}

/// Ends the machine, also if memory is mapped or a vCPU exists.
pub(crate) fn clear() {
    *lock() = None;
}

fn config<T>(config: *mut c_void, function: impl FnOnce(&mut Config) -> T) -> Result<T, Code> {
    objects::with(config, |object| match object {
        Object::VmConfig(config) => Ok(function(config)),
        _ => Err(Code::BAD_ARGUMENT),
    })
}

fn create(settings: *mut c_void) -> Outcome {
    if !control::is_entitled() {
        return Err(Code::DENIED);
    }
    let settings = match settings.is_null() {
        true => Config::default(),
        false => config(settings, |config| *config)?,
    };
    let mut machine = lock();
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
    let mut machine = lock();
    if machine.is_none() {
        return Err(Code::NO_DEVICE);
    }
    if vcpu::exist() || memory::is_mapped() {
        return Err(Code::BUSY);
    }
    *machine = None;
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hv_vm_config_create() -> *mut c_void {
    answer_object("hv_vm_config_create", || {
        Some(objects::create(Object::VmConfig(Config::default())))
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
        give(bits, control::max_address_bits())
    }

    fn hv_vm_config_get_default_ipa_size(bits: *mut u32) {
        give(bits, DEFAULT_ADDRESS_BITS)
    }

    fn hv_vm_config_set_ipa_size(settings: *mut c_void, bits: u32) {
        if bits == 0 {
            return Err(Code::BAD_ARGUMENT);
        }
        if bits > control::max_address_bits() {
            return Err(Code::UNSUPPORTED);
        }
        config(settings, |config| config.address_bits = bits)
    }

    fn hv_vm_config_get_ipa_size(settings: *mut c_void, bits: *mut u32) {
        give(bits, config(settings, |config| config.address_bits)?)
    }

    fn hv_vm_config_get_el2_supported(supported: *mut bool) {
        give(supported, false)
    }

    fn hv_vm_config_get_el2_enabled(settings: *mut c_void, enabled: *mut bool) {
        config(settings, |_| ())?;
        give(enabled, false)
    }

    fn hv_vm_config_set_el2_enabled(settings: *mut c_void, enabled: bool) {
        config(settings, |_| ())?;
        if enabled { Err(Code::UNSUPPORTED) } else { Ok(()) }
    }

    fn hv_vm_config_get_default_ipa_granule(granule: *mut u32) {
        give(granule, GRANULE_16K)
    }

    fn hv_vm_config_get_ipa_granule(settings: *mut c_void, granule: *mut u32) {
        give(granule, config(settings, |config| config.granule)?)
    }

    fn hv_vm_config_set_ipa_granule(settings: *mut c_void, granule: u32) {
        if granule != GRANULE_4K && granule != GRANULE_16K {
            return Err(Code::BAD_ARGUMENT);
        }
        config(settings, |config| config.granule = granule)
    }
}
