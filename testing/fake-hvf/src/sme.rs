//! The state of the scalable matrix extension. The guest executes none of its instructions.

use crate::calls::{Code, Outcome};
use crate::registers::unexpected;
use crate::unicorn::{Engine, register};

/// The longest vector in bytes, and its square: the array ZA.
pub(crate) const VECTOR: usize = 64;
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
    pub state: SmeState,
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

    pub(crate) fn set_state(&mut self, engine: &Engine, state: SmeState) -> Outcome {
        if state.streaming_sve_mode_enabled != self.state.streaming_sve_mode_enabled {
            self.vectors = [[0; VECTOR]; 32];
            self.predicates = [[0; PREDICATE]; 16];
            for number in 0..32 {
                let zero = engine.write(register::Q0 + number, 0_u128);
                zero.map_err(unexpected)?;
            }
            let reset = engine.write(register::FPSR, RESET_FPSR);
            reset.map_err(unexpected)?;
        }
        if state.za_storage_enabled != self.state.za_storage_enabled {
            self.array.fill(0);
            self.table.fill(0);
        }
        self.state = state;
        Ok(())
    }

    pub(crate) fn vector(&mut self, number: u32) -> Result<&mut [u8], Code> {
        self.streaming()?;
        let vector = self.vectors.get_mut(number as usize);
        Ok(vector.ok_or(Code::BAD_ARGUMENT)?)
    }

    pub(crate) fn predicate(&mut self, number: u32) -> Result<&mut [u8], Code> {
        self.streaming()?;
        let predicate = self.predicates.get_mut(number as usize);
        Ok(predicate.ok_or(Code::BAD_ARGUMENT)?)
    }

    pub(crate) fn array(&mut self) -> Result<&mut [u8], Code> {
        self.storage()?;
        Ok(&mut *self.array)
    }

    pub(crate) fn table(&mut self) -> Result<&mut [u8], Code> {
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
