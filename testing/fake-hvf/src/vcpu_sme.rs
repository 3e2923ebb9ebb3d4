//! The framework's functions for the scalable matrix extension.

use std::slice;

use crate::calls::{Code, Outcome, framework, give};
use crate::sme::{Sme, SmeState, VECTOR};
use crate::unicorn::Engine;
use crate::{host, vcpu};

fn own(id: u64, function: impl FnOnce(&Engine, &mut Sme) -> Outcome) -> Outcome {
    if !host::has_sme() {
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
        if !host::has_sme() {
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
