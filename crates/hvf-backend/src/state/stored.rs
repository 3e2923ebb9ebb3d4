//! The serialized form of a vCPU's state.

use serde::{Deserialize, Serialize};

use super::{
    Encoding, FormatVersion, PhysicalTimer, SmeState, SystemRegister, UnknownRegister, VirtualTimer,
};

/// A system register by its name, which may be unknown.
#[derive(Deserialize, Serialize)]
struct Register {
    register: String,
    value: u64,
}

#[derive(Deserialize, Serialize)]
pub(super) struct VcpuState {
    format: FormatVersion<2>,
    x: [u64; 31],
    pc: u64,
    cpsr: u64,
    fpcr: u64,
    fpsr: u64,
    q: [u128; 32],
    system: Vec<Register>,
    gic_cpu: Vec<Register>,
    vtimer: VirtualTimer,
    pending_irq: bool,
    pending_fiq: bool,
    trap_debug_exceptions: bool,
    trap_debug_reg_accesses: bool,
    creation_index: Option<u32>,
    physical_timer: Option<PhysicalTimer>,
    sme: Option<SmeState>,
}

fn named(registers: Vec<SystemRegister>) -> Vec<Register> {
    let named = registers.into_iter().map(|saved| Register {
        register: saved.register.to_string(),
        value: saved.value,
    });
    named.collect()
}

/// Converts the registers with known names, and moves the others to `unknown`.
fn encoded(registers: Vec<Register>, unknown: &mut Vec<UnknownRegister>) -> Vec<SystemRegister> {
    let mut encoded = Vec::with_capacity(registers.len());
    for Register { register, value } in registers {
        match Encoding::from_name(&register) {
            Some(register) => encoded.push(SystemRegister { register, value }),
            None => unknown.push(UnknownRegister {
                name: register,
                value,
            }),
        }
    }
    encoded
}

impl From<super::VcpuState> for VcpuState {
    fn from(state: super::VcpuState) -> Self {
        let unknown = state.unknown.into_iter().map(|unknown| Register {
            register: unknown.name,
            value: unknown.value,
        });
        let mut system = named(state.system);
        system.extend(unknown);
        Self {
            format: FormatVersion,
            x: state.x,
            pc: state.pc,
            cpsr: state.cpsr,
            fpcr: state.fpcr,
            fpsr: state.fpsr,
            q: state.q,
            system,
            gic_cpu: named(state.gic_cpu),
            vtimer: state.vtimer,
            pending_irq: state.pending_irq,
            pending_fiq: state.pending_fiq,
            trap_debug_exceptions: state.trap_debug_exceptions,
            trap_debug_reg_accesses: state.trap_debug_reg_accesses,
            creation_index: state.creation_index,
            physical_timer: state.physical_timer,
            sme: state.sme,
        }
    }
}

impl From<VcpuState> for super::VcpuState {
    fn from(stored: VcpuState) -> Self {
        let mut unknown = Vec::new();
        Self {
            x: stored.x,
            pc: stored.pc,
            cpsr: stored.cpsr,
            fpcr: stored.fpcr,
            fpsr: stored.fpsr,
            q: stored.q,
            system: encoded(stored.system, &mut unknown),
            gic_cpu: encoded(stored.gic_cpu, &mut unknown),
            vtimer: stored.vtimer,
            pending_irq: stored.pending_irq,
            pending_fiq: stored.pending_fiq,
            trap_debug_exceptions: stored.trap_debug_exceptions,
            trap_debug_reg_accesses: stored.trap_debug_reg_accesses,
            creation_index: stored.creation_index,
            physical_timer: stored.physical_timer,
            sme: stored.sme,
            unknown,
        }
    }
}
