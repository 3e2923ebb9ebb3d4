//! The interrupt controller: its configuration, registers and state.

mod delivery;
mod state;

use std::ffi::c_void;
use std::sync::PoisonError;

use crate::calls::{Code, Outcome, answer_object, framework, give};
use crate::gic_registers::{Gic, ICC_RPR_EL1, Registers, SHARED, read, write};
use crate::machine::with_gic;
use crate::{machine, memory, objects, vcpu, vcpus};
pub use delivery::{hv_gic_send_msi, hv_gic_set_spi};

const DISTRIBUTOR_SIZE: u64 = 64 << 10;
const REDISTRIBUTOR_SIZE: u64 = 128 << 10;
const REDISTRIBUTORS_SIZE: u64 = 32 << 20;
const MESSAGES_SIZE: u64 = 64 << 10;
const ALIGNMENT: u64 = 64 << 10;

/// Where the controller is (`hv_gic_config_t`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Config {
    distributor: Option<u64>,
    redistributors: Option<u64>,
    messages: Option<u64>,
    /// The first number of messages, and their count.
    message_numbers: Option<(u32, u32)>,
}

/// The controller's state, as the caller holds it.
struct State(Vec<u8>);

fn aligned(base: u64) -> Result<u64, Code> {
    match base.is_multiple_of(ALIGNMENT) {
        true => Ok(base),
        false => Err(Code::BAD_ARGUMENT),
    }
}

/// Creates the controller of a machine that has no vCPU yet.
fn create(settings: *mut c_void) -> Outcome {
    let settings = objects::with(settings, |config: &mut Config| *config)?;
    let (Some(distributor), Some(redistributors)) = (settings.distributor, settings.redistributors)
    else {
        return Err(Code::BAD_ARGUMENT);
    };
    machine::with(|machine| {
        if machine.gic.is_some() || vcpus::exist() {
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
    with_gic(|_| Ok(()))?;
    vcpu::own(id, |vcpu| {
        let registers = vcpu.shared.redistributor.lock();
        Ok(function(
            &mut registers.unwrap_or_else(PoisonError::into_inner),
        ))
    })
}

fn set_icc(id: u64, register: u16, value: u64) -> Outcome {
    with_gic(|_| Ok(()))?;
    vcpu::own(id, |vcpu| {
        let mut interface = vcpu.shared.cpu_interface();
        *interface.get_mut(&register).ok_or(Code::BAD_ARGUMENT)? = value;
        Ok(())
    })?;
    delivery::update();
    Ok(())
}

fn get_icc(id: u64, register: u16) -> Result<u64, Code> {
    with_gic(|_| Ok(()))?;
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
        Some(objects::create(Config::default()))
    })
}

/// Returns null unless the machine has a controller and no vCPU runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hv_gic_state_create() -> *mut c_void {
    answer_object("hv_gic_state_create", || {
        let state = state::capture().ok()?;
        Some(objects::create(State(state)))
    })
}

fn captured<T>(state: *mut c_void, function: impl FnOnce(&[u8]) -> T) -> Result<T, Code> {
    objects::with(state, |State(state)| function(state))
}

framework! {
    fn hv_gic_config_set_distributor_base(settings: *mut c_void, base: u64) {
        let base = aligned(base)?;
        objects::with(settings, |config: &mut Config| config.distributor = Some(base))
    }

    fn hv_gic_config_set_redistributor_base(settings: *mut c_void, base: u64) {
        let base = aligned(base)?;
        objects::with(settings, |config: &mut Config| config.redistributors = Some(base))
    }

    fn hv_gic_config_set_msi_region_base(settings: *mut c_void, base: u64) {
        let base = aligned(base)?;
        objects::with(settings, |config: &mut Config| config.messages = Some(base))
    }

    fn hv_gic_config_set_msi_interrupt_range(settings: *mut c_void, first: u32, count: u32) {
        let end = first.checked_add(count).ok_or(Code::BAD_ARGUMENT)?;
        if first < SHARED.0 || end > SHARED.0 + SHARED.1 {
            return Err(Code::BAD_ARGUMENT);
        }
        objects::with(settings, |config: &mut Config| config.message_numbers = Some((first, count)))
    }

    fn hv_gic_create(config: *mut c_void) {
        create(config)
    }

    fn hv_gic_reset() {
        with_gic(|gic| {
            gic.distributor.clear();
            Ok(())
        })?;
        for vcpu in vcpus::in_order() {
            vcpu.redistributor.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        delivery::update();
        Ok(())
    }

    fn hv_gic_get_distributor_reg(register: u32, value: *mut u64) {
        give(value, with_gic(|gic| Ok(read(&gic.distributor, register)))?)
    }

    fn hv_gic_set_distributor_reg(register: u32, value: u64) {
        with_gic(|gic| {
            write(&mut gic.distributor, register, value);
            Ok(())
        })?;
        delivery::update();
        Ok(())
    }

    fn hv_gic_get_redistributor_base(id: u64, base: *mut u64) {
        let start = with_gic(|gic| Ok(gic.redistributors_start))?;
        let own = vcpu::own(id, |vcpu| Ok(vcpu.shared.serial))?;
        let order = vcpus::in_order().iter().take_while(|vcpu| vcpu.serial < own).count();
        give(base, start + order as u64 * REDISTRIBUTOR_SIZE)
    }

    fn hv_gic_get_redistributor_reg(id: u64, register: u32, value: *mut u64) {
        give(value, redistributor(id, |registers| read(registers, register))?)
    }

    fn hv_gic_set_redistributor_reg(id: u64, register: u32, value: u64) {
        redistributor(id, |registers| write(registers, register, value))
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

    fn hv_gic_get_spi_interrupt_range(first: *mut u32, count: *mut u32) {
        give(first, SHARED.0)?;
        give(count, SHARED.1)
    }
}

/// Defines functions that return a size or an alignment in bytes.
macro_rules! sizes {
    ($(fn $name:ident = $size:expr;)*) => {
        framework! {$(
            fn $name(size: *mut usize) {
                give(size, $size as usize)
            }
        )*}
    };
}

sizes! {
    fn hv_gic_get_distributor_size = DISTRIBUTOR_SIZE;
    fn hv_gic_get_distributor_base_alignment = ALIGNMENT;
    fn hv_gic_get_redistributor_size = REDISTRIBUTOR_SIZE;
    fn hv_gic_get_redistributor_region_size = REDISTRIBUTORS_SIZE;
    fn hv_gic_get_redistributor_base_alignment = ALIGNMENT;
    fn hv_gic_get_msi_region_size = MESSAGES_SIZE;
    fn hv_gic_get_msi_region_base_alignment = ALIGNMENT;
}
