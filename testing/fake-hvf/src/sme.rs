//! The state of the scalable matrix extension. The guest executes none of its instructions.

use std::slice;

use crate::calls::{Code, Outcome, framework, give};
use crate::unicorn::{Engine, register};
use crate::{control, vcpu};

/// The longest vector in bytes, and its square: the array ZA.
const VECTOR: usize = 64;
const ARRAY: usize = VECTOR * VECTOR;
/// A predicate has a bit for each byte of a vector.
const PREDICATE: usize = VECTOR / 8;

/// FPSR after streaming mode was entered or left (Arm ARM, `ResetSVEState`).
const RESET_FPSR: u64 = 0x0800_009f;

/// `hv_vcpu_sme_state_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SmeState {
    pub streaming_sve_mode_enabled: bool,
    pub za_storage_enabled: bool,
}

/// The extension's registers of a vCPU.
#[derive(Debug)]
pub(crate) struct Sme {
    state: SmeState,
    vectors: [[u8; VECTOR]; 32],
    predicates: [[u8; PREDICATE]; 16],
    array: Box<[u8; ARRAY]>,
    table: [u8; VECTOR],
}

impl Default for Sme {
    fn default() -> Self {
        Self {
            state: SmeState::default(),
            vectors: [[0; VECTOR]; 32],
            predicates: [[0; PREDICATE]; 16],
            array: Box::new([0; ARRAY]),
            table: [0; VECTOR],
        }
    }
}

impl Sme {
    /// Returns Q0 to Q31 in streaming mode: the lowest bytes of a vector.
    pub(crate) fn q(&mut self, number: u32) -> Option<&mut [u8; 16]> {
        if !self.state.streaming_sve_mode_enabled {
            return None;
        }
        self.vectors.get_mut(number as usize)?.first_chunk_mut()
    }

    fn set_state(&mut self, engine: &Engine, state: SmeState) -> Outcome {
        if state.streaming_sve_mode_enabled != self.state.streaming_sve_mode_enabled {
            self.vectors = [[0; VECTOR]; 32];
            self.predicates = [[0; PREDICATE]; 16];
            for number in 0..32 {
                let zero = engine.write(register::Q0 + number, 0_u128);
                zero.map_err(crate::registers::unexpected)?;
            }
            let reset = engine.write(register::FPSR, RESET_FPSR);
            reset.map_err(crate::registers::unexpected)?;
        }
        if state.za_storage_enabled != self.state.za_storage_enabled {
            self.array.fill(0);
            self.table.fill(0);
        }
        self.state = state;
        Ok(())
    }

    fn vector(&mut self, number: u32) -> Result<&mut [u8], Code> {
        self.streaming()?;
        let vector = self.vectors.get_mut(number as usize);
        Ok(vector.ok_or(Code::BAD_ARGUMENT)?)
    }

    fn predicate(&mut self, number: u32) -> Result<&mut [u8], Code> {
        self.streaming()?;
        let predicate = self.predicates.get_mut(number as usize);
        Ok(predicate.ok_or(Code::BAD_ARGUMENT)?)
    }

    fn array(&mut self) -> Result<&mut [u8], Code> {
        self.storage()?;
        Ok(&mut *self.array)
    }

    fn table(&mut self) -> Result<&mut [u8], Code> {
        self.storage()?;
        Ok(&mut self.table)
    }

    fn streaming(&self) -> Outcome {
        match self.state.streaming_sve_mode_enabled {
            true => Ok(()),
            false => Err(Code::ILLEGAL_GUEST_STATE),
        }
    }

    fn storage(&self) -> Outcome {
        match self.state.za_storage_enabled {
            true => Ok(()),
            false => Err(Code::ILLEGAL_GUEST_STATE),
        }
    }
}

fn own(id: u64, function: impl FnOnce(&Engine, &mut Sme) -> Outcome) -> Outcome {
    if !control::has_sme() {
        return Err(Code::UNSUPPORTED);
    }
    vcpu::own(id, |vcpu| function(&vcpu.emulation.engine, &mut vcpu.sme))
}

fn read(register: &[u8], to: *mut u8, length: usize) -> Outcome {
    if to.is_null() || length != register.len() {
        return Err(Code::BAD_ARGUMENT);
    }
    // SAFETY: the caller's buffer has `length` bytes.
    unsafe { to.copy_from_nonoverlapping(register.as_ptr(), length) };
    Ok(())
}

fn write(register: &mut [u8], from: *const u8, length: usize) -> Outcome {
    if from.is_null() || length != register.len() {
        return Err(Code::BAD_ARGUMENT);
    }
    // SAFETY: the caller's buffer has `length` bytes.
    register.copy_from_slice(unsafe { slice::from_raw_parts(from, length) });
    Ok(())
}

framework! {
    fn hv_sme_config_get_max_svl_bytes(size: *mut usize) {
        if !control::has_sme() {
            return Err(Code::UNSUPPORTED);
        }
        give(size, VECTOR)
    }

    fn hv_vcpu_get_sme_state(id: u64, state: *mut SmeState) {
        own(id, |_, sme| give(state, sme.state))
    }

    fn hv_vcpu_set_sme_state(id: u64, state: *const SmeState) {
        if state.is_null() {
            return Err(Code::BAD_ARGUMENT);
        }
        // SAFETY: the caller passes the address of a state.
        let state = unsafe { state.read() };
        own(id, |engine, sme| sme.set_state(engine, state))
    }

    fn hv_vcpu_get_sme_z_reg(id: u64, number: u32, value: *mut u8, length: usize) {
        own(id, |_, sme| read(sme.vector(number)?, value, length))
    }

    fn hv_vcpu_set_sme_z_reg(id: u64, number: u32, value: *const u8, length: usize) {
        own(id, |_, sme| write(sme.vector(number)?, value, length))
    }

    fn hv_vcpu_get_sme_p_reg(id: u64, number: u32, value: *mut u8, length: usize) {
        own(id, |_, sme| read(sme.predicate(number)?, value, length))
    }

    fn hv_vcpu_set_sme_p_reg(id: u64, number: u32, value: *const u8, length: usize) {
        own(id, |_, sme| write(sme.predicate(number)?, value, length))
    }

    fn hv_vcpu_get_sme_za_reg(id: u64, value: *mut u8, length: usize) {
        own(id, |_, sme| read(sme.array()?, value, length))
    }

    fn hv_vcpu_set_sme_za_reg(id: u64, value: *const u8, length: usize) {
        own(id, |_, sme| write(sme.array()?, value, length))
    }

    fn hv_vcpu_get_sme_zt0_reg(id: u64, value: *mut u8) {
        own(id, |_, sme| read(sme.table()?, value, VECTOR))
    }

    fn hv_vcpu_set_sme_zt0_reg(id: u64, value: *const u8) {
        own(id, |_, sme| write(sme.table()?, value, VECTOR))
    }
}
