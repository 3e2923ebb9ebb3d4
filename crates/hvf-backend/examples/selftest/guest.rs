//! A machine with a program of a few instructions.

use std::sync::Arc;

use hvf_backend::el1::{self, Start};
use hvf_backend::{
    Exit, ExitAction, GuestRam, PAGE_SIZE, Register, Stage2, Stage2Tracker, Vcpu, Vm, VmOptions,
};
#[cfg(feature = "macos-15")]
use hvf_backend::{SysReg, SystemRegister};
use page_reader::RamLayout;

use crate::report::NotPassed;

pub(crate) const RAM: u64 = 0x8000_0000;
pub(crate) const SIZE: u64 = 64 << 20;
pub(crate) const PROGRAM: u64 = RAM + PAGE_SIZE;
pub(crate) const DATA: u64 = RAM + (4 << 20);

/// The class of hypercalls (ESR_EL2.EC).
const HVC: u64 = 0x16;

pub(crate) const HYPERCALL: u32 = 0xd400_0002;

/// Returns the layout of the RAM.
pub(crate) fn layout() -> Result<RamLayout, NotPassed> {
    Ok(RamLayout::single(RAM, SIZE)?)
}

/// Returns RAM with the program.
pub(crate) fn ram(code: &[u32]) -> Result<Arc<GuestRam>, NotPassed> {
    let ram = Arc::new(GuestRam::new(layout()?)?);
    ram.write(RAM, &el1::page_table())?;
    let code: Vec<u8> = code.iter().copied().flat_map(u32::to_le_bytes).collect();
    ram.write(PROGRAM, &code)?;
    Ok(ram)
}

/// Creates a machine whose RAM has the program.
pub(crate) fn machine(options: &VmOptions, code: &[u32]) -> Result<(Vm, Stage2), NotPassed> {
    let vm = options.create()?;
    let stage2 = Stage2::map(&vm, &ram(code)?)?;
    Ok((vm, stage2))
}

/// Sets the vCPU to the first instruction, with arguments in X0, X1 and so on.
pub(crate) fn start(vcpu: &Vcpu, arguments: &[u64]) -> Result<(), NotPassed> {
    let start = Start {
        entry: PROGRAM,
        page_table: RAM,
        address_bits: vcpu.vm().address_bits(),
    };
    let mut state = start.state();
    state.x[..arguments.len()].copy_from_slice(arguments);
    let restored = state.restore(vcpu, 0)?;
    match restored.differing[..] {
        [] => Ok(()),
        _ => Err(NotPassed::Failed(format!(
            "the initial state was not taken: {restored:x?}"
        ))),
    }
}

/// Does what [`start`] does, also for a vCPU of a machine with an interrupt controller, whose state
/// would have to include that of the CPU interface.
#[cfg(feature = "macos-15")]
pub(crate) fn start_by_registers(vcpu: &Vcpu, argument: u64) -> Result<(), NotPassed> {
    let start = Start {
        entry: PROGRAM,
        page_table: RAM,
        address_bits: vcpu.vm().address_bits(),
    };
    let state = start.state();
    for register in [
        SysReg::MAIR_EL1,
        SysReg::TCR_EL1,
        SysReg::TTBR0_EL1,
        SysReg::CPACR_EL1,
        SysReg::SCTLR_EL1,
    ] {
        let is_saved = |saved: &&SystemRegister| saved.register.0 == register as u16;
        let saved = state.system.iter().find(is_saved);
        let saved = saved.ok_or("the initial state lacks a register")?;
        vcpu.set_system_register(register, saved.value)?;
    }
    vcpu.set_register(Register::PC, state.pc)?;
    vcpu.set_register(Register::CPSR, state.cpsr)?;
    vcpu.set_register(Register::X0, argument)?;
    Ok(())
}

/// Returns the operand of the hypercall that the exit is.
pub(crate) fn hypercall(exit: Exit) -> Result<u64, NotPassed> {
    match exit {
        Exit::Exception(exception) if exception.syndrome >> 26 & 0x3f == HVC => {
            Ok(exception.syndrome & 0xffff)
        }
        other => Err(NotPassed::Failed(format!(
            "the guest stopped by {other:x?}"
        ))),
    }
}

/// Runs the guest until its hypercall. Returns the number of write faults.
pub(crate) fn run_tracked(
    vcpu: &mut Vcpu,
    tracker: &Stage2Tracker<Stage2>,
) -> Result<u64, NotPassed> {
    let mut faults = 0;
    loop {
        let run_guard = tracker.enter();
        let exit = vcpu.run()?;
        if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Forward {
            hypercall(exit)?;
            return Ok(faults);
        }
        faults += 1;
    }
}

/// Returns the program counter.
pub(crate) fn pc(vcpu: &Vcpu) -> Result<u64, NotPassed> {
    Ok(vcpu.register(Register::PC)?)
}
