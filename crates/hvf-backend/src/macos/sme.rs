//! The state of the scalable matrix extension.

#![allow(unsafe_code)]

use std::fmt;

use applevisor_sys::{hv_error_t, hv_sys_reg_t, hv_vcpu_sme_state_t};

use super::errors::{CaptureError, HvError, RestoreError};
use super::newer::{self, UnsupportedFunction};
use super::vcpu::Vcpu;
use crate::state::{SmeState, StreamingRegisters, ZaRegisters};

/// The lower bit of SMEN: the guest may execute instructions of the extension (Arm ARM, CPACR_EL1).
const SME_ON: u64 = 1 << 24;

const VECTORS: usize = 32;
const PREDICATES: usize = 16;
/// The size of ZT0 in bytes.
const TABLE: usize = 64;

/// Captures the state, if there is any.
///
/// A system without the functions can't save the state of a guest that uses the extension. A guest
/// that has not switched it on has none.
pub(super) fn capture(vcpu: &Vcpu) -> Result<Option<SmeState>, CaptureError> {
    let get = match newer::hv_vcpu_get_sme_state() {
        Ok(get) => get,
        Err(missing) => {
            let control = vcpu.system_register(hv_sys_reg_t::CPACR_EL1)?;
            return match control & SME_ON {
                0 => Ok(None),
                _ => Err(CaptureError::Sme(missing)),
            };
        }
    };
    let mut modes = hv_vcpu_sme_state_t::default();
    // SAFETY: the vCPU exists and belongs to this thread. The framework writes 0 or 1 to both
    // fields of a variable.
    let code = unsafe { get(vcpu.id, &raw mut modes) };
    match HvError::check("hv_vcpu_get_sme_state", code) {
        Err(error) if error.is(hv_error_t::HV_UNSUPPORTED) => return Ok(None),
        read => read?,
    }
    if !modes.streaming_sve_mode_enabled && !modes.za_storage_enabled {
        return Ok(None);
    }
    let length = vector_length()?;
    let mut state = SmeState::default();
    if modes.streaming_sve_mode_enabled {
        let mut streaming = StreamingRegisters::default();
        for number in 0..VECTORS {
            streaming.z.push(read(vcpu, Part::Z(number), length)?);
        }
        for number in 0..PREDICATES {
            streaming.p.push(read(vcpu, Part::P(number), length)?);
        }
        state.streaming = Some(streaming);
    }
    if modes.za_storage_enabled {
        state.za = Some(ZaRegisters {
            za: read(vcpu, Part::Za, length)?,
            zt0: read(vcpu, Part::Zt0, length)?,
        });
    }
    Ok(Some(state))
}

/// Restores PSTATE.SM and PSTATE.ZA. This resets the vector registers and FPSR, so those are
/// written afterwards.
pub(super) fn restore_modes(vcpu: &Vcpu, state: &SmeState) -> Result<(), RestoreError> {
    check_sizes(state, vector_length()?)?;
    let modes = hv_vcpu_sme_state_t {
        streaming_sve_mode_enabled: state.streaming.is_some(),
        za_storage_enabled: state.za.is_some(),
    };
    let set = newer::hv_vcpu_set_sme_state()?;
    // SAFETY: the vCPU exists and belongs to this thread. The address is of a variable.
    let code = unsafe { set(vcpu.id, &raw const modes) };
    Ok(HvError::check("hv_vcpu_set_sme_state", code)?)
}

/// Restores the registers, after the modes and after Q0 to Q31, which are the lowest 16 bytes of
/// Z0 to Z31 in streaming mode.
pub(super) fn restore_registers(vcpu: &Vcpu, state: &SmeState) -> Result<(), RestoreError> {
    if let Some(StreamingRegisters { z, p }) = &state.streaming {
        for (number, value) in z.iter().enumerate() {
            write(vcpu, Part::Z(number), value)?;
        }
        for (number, value) in p.iter().enumerate() {
            write(vcpu, Part::P(number), value)?;
        }
    }
    if let Some(ZaRegisters { za, zt0 }) = &state.za {
        write(vcpu, Part::Za, za)?;
        write(vcpu, Part::Zt0, zt0)?;
    }
    Ok(())
}

/// A register of the extension.
#[derive(Clone, Copy, Debug)]
enum Part {
    Z(usize),
    P(usize),
    Za,
    Zt0,
}

impl Part {
    /// Returns the size in bytes for vectors of `length` bytes.
    fn size(self, length: usize) -> usize {
        match self {
            Self::Z(_) => length,
            Self::P(_) => length / 8,
            Self::Za => length * length,
            Self::Zt0 => TABLE,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Z(number) => write!(f, "Z{number}"),
            Self::P(number) => write!(f, "P{number}"),
            Self::Za => f.write_str("ZA"),
            Self::Zt0 => f.write_str("ZT0"),
        }
    }
}

/// An error of a call that the system may not have.
#[derive(Debug)]
enum CallError {
    Missing(UnsupportedFunction),
    Refused(HvError),
}

impl From<UnsupportedFunction> for CallError {
    fn from(missing: UnsupportedFunction) -> Self {
        Self::Missing(missing)
    }
}

impl From<HvError> for CallError {
    fn from(error: HvError) -> Self {
        Self::Refused(error)
    }
}

impl From<CallError> for CaptureError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Missing(missing) => Self::Sme(missing),
            CallError::Refused(error) => Self::Refused(error),
        }
    }
}

impl From<CallError> for RestoreError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Missing(missing) => Self::Unsupported(missing),
            CallError::Refused(error) => Self::Refused(error),
        }
    }
}

/// Returns the longest vector length of the CPU in bytes.
fn vector_length() -> Result<usize, CallError> {
    let get = newer::hv_sme_config_get_max_svl_bytes()?;
    let mut length = 0;
    // SAFETY: the address is of a variable.
    let code = unsafe { get(&raw mut length) };
    HvError::check("hv_sme_config_get_max_svl_bytes", code)?;
    Ok(length)
}

/// Checks the size of each register before any is written.
fn check_sizes(state: &SmeState, length: usize) -> Result<(), RestoreError> {
    let mut expected = Vec::new();
    if let Some(StreamingRegisters { z, p }) = &state.streaming {
        if z.len() != VECTORS || p.len() != PREDICATES {
            return Err(RestoreError::SmeRegisters);
        }
        expected.extend(z.iter().enumerate().map(|(n, z)| (Part::Z(n), z)));
        expected.extend(p.iter().enumerate().map(|(n, p)| (Part::P(n), p)));
    }
    if let Some(ZaRegisters { za, zt0 }) = &state.za {
        expected.extend([(Part::Za, za), (Part::Zt0, zt0)]);
    }
    for (part, value) in expected {
        if value.len() != part.size(length) {
            return Err(RestoreError::SmeSize {
                register: part.to_string(),
                captured: value.len(),
                size: part.size(length),
            });
        }
    }
    Ok(())
}

fn read(vcpu: &Vcpu, part: Part, length: usize) -> Result<Vec<u8>, CallError> {
    let mut value = vec![0; part.size(length)];
    let (id, to, size) = (vcpu.id, value.as_mut_ptr(), value.len());
    // SAFETY, for each call: the vCPU exists and belongs to this thread, and the buffer has the
    // size that is passed, or 64 bytes for ZT0.
    let (call, code) = match part {
        Part::Z(number) => {
            let get = newer::hv_vcpu_get_sme_z_reg()?;
            // SAFETY: see above.
            let code = unsafe { get(id, number as u32, to, size) };
            ("hv_vcpu_get_sme_z_reg", code)
        }
        Part::P(number) => {
            let get = newer::hv_vcpu_get_sme_p_reg()?;
            // SAFETY: see above.
            let code = unsafe { get(id, number as u32, to, size) };
            ("hv_vcpu_get_sme_p_reg", code)
        }
        Part::Za => {
            let get = newer::hv_vcpu_get_sme_za_reg()?;
            // SAFETY: see above.
            let code = unsafe { get(id, to, size) };
            ("hv_vcpu_get_sme_za_reg", code)
        }
        Part::Zt0 => {
            let get = newer::hv_vcpu_get_sme_zt0_reg()?;
            // SAFETY: see above.
            ("hv_vcpu_get_sme_zt0_reg", unsafe { get(id, to) })
        }
    };
    HvError::check(call, code)?;
    Ok(value)
}

/// Writes a register of a size that was checked, and reads it back.
fn write(vcpu: &Vcpu, part: Part, value: &[u8]) -> Result<(), RestoreError> {
    let (id, from, size) = (vcpu.id, value.as_ptr(), value.len());
    // SAFETY, for each call: the vCPU exists and belongs to this thread, and the slice has the
    // size that is passed, or 64 bytes for ZT0 (`check_sizes`).
    let (call, code) = match part {
        Part::Z(number) => {
            let set = newer::hv_vcpu_set_sme_z_reg()?;
            // SAFETY: see above.
            let code = unsafe { set(id, number as u32, from, size) };
            ("hv_vcpu_set_sme_z_reg", code)
        }
        Part::P(number) => {
            let set = newer::hv_vcpu_set_sme_p_reg()?;
            // SAFETY: see above.
            let code = unsafe { set(id, number as u32, from, size) };
            ("hv_vcpu_set_sme_p_reg", code)
        }
        Part::Za => {
            let set = newer::hv_vcpu_set_sme_za_reg()?;
            // SAFETY: see above.
            let code = unsafe { set(id, from, size) };
            ("hv_vcpu_set_sme_za_reg", code)
        }
        Part::Zt0 => {
            let set = newer::hv_vcpu_set_sme_zt0_reg()?;
            // SAFETY: see above.
            ("hv_vcpu_set_sme_zt0_reg", unsafe { set(id, from) })
        }
    };
    HvError::check(call, code)?;
    let length = match part {
        Part::Z(_) => size,
        Part::P(_) => size * 8,
        Part::Za => size.isqrt(),
        Part::Zt0 => TABLE,
    };
    match read(vcpu, part, length)? == value {
        true => Ok(()),
        false => Err(RestoreError::SmeNotTaken {
            register: part.to_string(),
        }),
    }
}
