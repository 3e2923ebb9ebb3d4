//! The interrupt controller: its configuration, registers and state.

mod delivery;
mod state;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::PoisonError;

use crate::calls::{Code, Outcome, answer_object, framework, give};
use crate::objects::{self, Object};
use crate::{memory, vcpu, vm};
pub use delivery::{hv_gic_send_msi, hv_gic_set_spi};

const DISTRIBUTOR_SIZE: u64 = 64 << 10;
const REDISTRIBUTOR_SIZE: u64 = 128 << 10;
const REDISTRIBUTORS_SIZE: u64 = 32 << 20;
const MESSAGES_SIZE: u64 = 64 << 10;
const ALIGNMENT: u64 = 64 << 10;

/// Shared interrupts: the first one, and their number.
const SHARED: (u32, u32) = (32, 988);

/// The CPU interface's registers that can be written, and the read-only priority.
const ICC: [u16; 9] = [
    0xc230, // PMR_EL1
    0xc643, // BPR0_EL1
    0xc644, // AP0R0_EL1
    0xc648, // AP1R0_EL1
    0xc663, // BPR1_EL1
    0xc664, // CTLR_EL1
    0xc665, // SRE_EL1
    0xc666, // IGRPEN0_EL1
    0xc667, // IGRPEN1_EL1
];
const ICC_RPR_EL1: u16 = 0xc65b;
const ICC_SRE_EL1: u16 = 0xc665;
const ICC_CTLR_EL1: u16 = 0xc664;

/// Registers by their offsets, and their values.
pub(crate) type Registers = BTreeMap<u32, u64>;

/// Where the controller is (`hv_gic_config_t`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Config {
    distributor: Option<u64>,
    redistributors: Option<u64>,
    messages: Option<u64>,
    /// The first number of messages, and their count.
    message_numbers: Option<(u32, u32)>,
}

/// The controller of the machine.
#[derive(Debug, Default)]
pub(crate) struct Gic {
    distributor: Registers,
    redistributors_start: u64,
    /// The frame for messages, their first number, and their count.
    messages: Option<(u64, u32, u32)>,
}

/// Returns the CPU interface's registers of a new vCPU.
pub(crate) fn new_cpu_interface() -> BTreeMap<u16, u64> {
    let mut registers: BTreeMap<u16, u64> = ICC.into_iter().map(|name| (name, 0)).collect();
    registers.insert(ICC_SRE_EL1, 0b111);
    registers.insert(ICC_CTLR_EL1, 0x400);
    registers
}

fn with<T>(function: impl FnOnce(&mut Gic) -> Result<T, Code>) -> Result<T, Code> {
    vm::with(|machine| function(machine.gic.as_mut().ok_or(Code::UNSUPPORTED)?))
}

/// Returns whether the machine has a controller.
pub(crate) fn exists() -> bool {
    with(|_| Ok(())).is_ok()
}

fn config<T>(config: *mut c_void, function: impl FnOnce(&mut Config) -> T) -> Result<T, Code> {
    objects::with(config, |object| match object {
        Object::GicConfig(config) => Ok(function(config)),
        _ => Err(Code::BAD_ARGUMENT),
    })
}

fn aligned(base: u64) -> Result<u64, Code> {
    match base.is_multiple_of(ALIGNMENT) {
        true => Ok(base),
        false => Err(Code::BAD_ARGUMENT),
    }
}

/// Creates the controller of a machine that has no vCPU yet.
fn create(settings: *mut c_void) -> Outcome {
    let settings = config(settings, |config| *config)?;
    let (Some(distributor), Some(redistributors)) = (settings.distributor, settings.redistributors)
    else {
        return Err(Code::BAD_ARGUMENT);
    };
    vm::with(|machine| {
        if machine.gic.is_some() || vcpu::exist() {
            return Err(Code::BUSY);
        }
        // Messages need both settings.
        let messages = settings.messages.zip(settings.message_numbers);
        let mut places = vec![
            (distributor, DISTRIBUTOR_SIZE),
            (redistributors, REDISTRIBUTORS_SIZE),
        ];
        places.extend(messages.map(|(frame, _)| (frame, MESSAGES_SIZE)));
        let limit = 1_u64.checked_shl(machine.address_bits).unwrap_or(u64::MAX);
        let overlaps = |(start, size): (u64, u64), other: (u64, u64)| {
            start < other.0.saturating_add(other.1) && other.0 < start.saturating_add(size)
        };
        let in_memory = |place| {
            let mut mapped = memory::mapped().into_iter();
            mapped.any(|region| overlaps(place, (region.guest_start, region.size)))
        };
        let outside = |(start, size): (u64, u64)| start.saturating_add(size) > limit;
        let mut pairs = (0..places.len()).flat_map(|n| (0..n).map(move |m| (m, n)));
        if pairs.any(|(m, n)| overlaps(places[m], places[n]))
            || places.into_iter().any(|at| outside(at) || in_memory(at))
        {
            return Err(Code::BAD_ARGUMENT);
        }
        machine.gic = Some(Gic {
            distributor: Registers::new(),
            redistributors_start: redistributors,
            messages: messages.map(|(frame, (first, count))| (frame, first, count)),
        });
        Ok(())
    })
}

fn redistributor<T>(id: u64, function: impl FnOnce(&mut Registers) -> T) -> Result<T, Code> {
    with(|_| Ok(()))?;
    vcpu::own(id, |vcpu| {
        let registers = vcpu.shared.redistributor.lock();
        Ok(function(
            &mut registers.unwrap_or_else(PoisonError::into_inner),
        ))
    })
}

fn set_icc(id: u64, register: u16, value: u64) -> Outcome {
    with(|_| Ok(()))?;
    vcpu::own(id, |vcpu| {
        let mut interface = vcpu.shared.cpu_interface();
        *interface.get_mut(&register).ok_or(Code::BAD_ARGUMENT)? = value;
        Ok(())
    })?;
    delivery::update();
    Ok(())
}

fn get_icc(id: u64, register: u16) -> Result<u64, Code> {
    with(|_| Ok(()))?;
    vcpu::own(id, |vcpu| match register {
        ICC_RPR_EL1 => Ok(0xff),
        _ => {
            let interface = vcpu.shared.cpu_interface();
            interface.get(&register).copied().ok_or(Code::BAD_ARGUMENT)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hv_gic_config_create() -> *mut c_void {
    answer_object("hv_gic_config_create", || {
        Some(objects::create(Object::GicConfig(Config::default())))
    })
}

/// Returns null unless the machine has a controller and no vCPU runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hv_gic_state_create() -> *mut c_void {
    answer_object("hv_gic_state_create", || {
        let state = state::capture().ok()?;
        Some(objects::create(Object::GicState(state)))
    })
}

fn captured<T>(state: *mut c_void, function: impl FnOnce(&[u8]) -> T) -> Result<T, Code> {
    objects::with(state, |object| match object {
        Object::GicState(state) => Ok(function(state)),
        _ => Err(Code::BAD_ARGUMENT),
    })
}

framework! {
    fn hv_gic_config_set_distributor_base(settings: *mut c_void, base: u64) {
        let base = aligned(base)?;
        config(settings, |config| config.distributor = Some(base))
    }

    fn hv_gic_config_set_redistributor_base(settings: *mut c_void, base: u64) {
        let base = aligned(base)?;
        config(settings, |config| config.redistributors = Some(base))
    }

    fn hv_gic_config_set_msi_region_base(settings: *mut c_void, base: u64) {
        let base = aligned(base)?;
        config(settings, |config| config.messages = Some(base))
    }

    fn hv_gic_config_set_msi_interrupt_range(settings: *mut c_void, first: u32, count: u32) {
        let end = first.checked_add(count).ok_or(Code::BAD_ARGUMENT)?;
        if first < SHARED.0 || end > SHARED.0 + SHARED.1 {
            return Err(Code::BAD_ARGUMENT);
        }
        config(settings, |config| config.message_numbers = Some((first, count)))
    }

    fn hv_gic_create(config: *mut c_void) {
        create(config)
    }

    fn hv_gic_reset() {
        with(|gic| {
            gic.distributor.clear();
            Ok(())
        })?;
        for vcpu in vcpu::in_order() {
            vcpu.redistributor.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        delivery::update();
        Ok(())
    }

    fn hv_gic_get_distributor_reg(register: u32, value: *mut u64) {
        give(value, with(|gic| Ok(delivery::read(&gic.distributor, register)))?)
    }

    fn hv_gic_set_distributor_reg(register: u32, value: u64) {
        with(|gic| {
            delivery::write(&mut gic.distributor, register, value);
            Ok(())
        })?;
        delivery::update();
        Ok(())
    }

    fn hv_gic_get_redistributor_base(id: u64, base: *mut u64) {
        let start = with(|gic| Ok(gic.redistributors_start))?;
        let own = vcpu::own(id, |vcpu| Ok(vcpu.shared.serial))?;
        let order = vcpu::in_order().iter().take_while(|vcpu| vcpu.serial < own).count();
        give(base, start + order as u64 * REDISTRIBUTOR_SIZE)
    }

    fn hv_gic_get_redistributor_reg(id: u64, register: u32, value: *mut u64) {
        give(value, redistributor(id, |registers| delivery::read(registers, register))?)
    }

    fn hv_gic_set_redistributor_reg(id: u64, register: u32, value: u64) {
        redistributor(id, |registers| delivery::write(registers, register, value))
    }

    fn hv_gic_get_icc_reg(id: u64, register: u16, value: *mut u64) {
        give(value, get_icc(id, register)?)
    }

    fn hv_gic_set_icc_reg(id: u64, register: u16, value: u64) {
        set_icc(id, register, value)
    }

    fn hv_gic_state_get_size(state: *mut c_void, size: *mut usize) {
        give(size, captured(state, <[u8]>::len)?)
    }

    fn hv_gic_state_get_data(state: *mut c_void, data: *mut c_void) {
        if data.is_null() {
            return Err(Code::BAD_ARGUMENT);
        }
        captured(state, |state| {
            // SAFETY: the caller's buffer is as large as `hv_gic_state_get_size` reported.
            unsafe { data.cast::<u8>().copy_from_nonoverlapping(state.as_ptr(), state.len()) };
        })
    }

    fn hv_gic_set_state(data: *const c_void, size: usize) {
        if data.is_null() {
            return Err(Code::BAD_ARGUMENT);
        }
        // SAFETY: the caller passes `size` bytes.
        state::restore(unsafe { std::slice::from_raw_parts(data.cast(), size) })?;
        delivery::update();
        Ok(())
    }

    fn hv_gic_get_distributor_size(size: *mut usize) {
        give(size, DISTRIBUTOR_SIZE as usize)
    }

    fn hv_gic_get_distributor_base_alignment(alignment: *mut usize) {
        give(alignment, ALIGNMENT as usize)
    }

    fn hv_gic_get_redistributor_size(size: *mut usize) {
        give(size, REDISTRIBUTOR_SIZE as usize)
    }

    fn hv_gic_get_redistributor_region_size(size: *mut usize) {
        give(size, REDISTRIBUTORS_SIZE as usize)
    }

    fn hv_gic_get_redistributor_base_alignment(alignment: *mut usize) {
        give(alignment, ALIGNMENT as usize)
    }

    fn hv_gic_get_msi_region_size(size: *mut usize) {
        give(size, MESSAGES_SIZE as usize)
    }

    fn hv_gic_get_msi_region_base_alignment(alignment: *mut usize) {
        give(alignment, ALIGNMENT as usize)
    }

    fn hv_gic_get_spi_interrupt_range(first: *mut u32, count: *mut u32) {
        give(first, SHARED.0)?;
        give(count, SHARED.1)
    }
}
