//! Interrupts, and the framework's interrupt controller.

use hvf_backend::{SysReg, VcpuState, Vm};

use crate::guest::{HYPERCALL, PROGRAM, hypercall, machine, start};
use crate::report::{Measured, NotPassed, Outcome, Step, ensure};

pub(crate) const STEPS: [Step; 3] = [
    Step {
        name: "interrupts",
        shows: "a pending IRQ is taken as an IRQ and an FIQ as an FIQ, and the exit clears them",
        run: interrupts,
    },
    Step {
        name: "gic",
        shows: "a machine with two vCPUs and the interrupt controller is restored",
        run: gic,
    },
    Step {
        name: "pause",
        shows: "vCPUs that wait for an interrupt inside the framework are paused, and go on",
        run: pause,
    },
];

const VECTORS: u64 = PROGRAM + 0x800;

fn interrupts(measured: &mut Measured) -> Outcome {
    for (name, irq, vector) in [("IRQ", true, 0x280), ("FIQ", false, 0x300)] {
        // msr daifclr, #3; b .
        let (vm, stage2) = machine(&Vm::options(), &[0xd503_43ff, 0x1400_0000])?;
        for handler in [0x280, 0x300] {
            let code = HYPERCALL | handler << 5;
            let at = VECTORS + u64::from(handler);
            stage2.ram().write(at, &code.to_le_bytes())?;
        }
        let mut vcpu = vm.create_vcpu()?;
        start(&vcpu, &[])?;
        vcpu.set_system_register(SysReg::VBAR_EL1, VECTORS)?;
        let mut state = VcpuState::capture(&vcpu)?;
        (state.pending_irq, state.pending_fiq) = (irq, !irq);
        let _ = state.restore(&vcpu, 0)?;
        let taken = hypercall(vcpu.run()?)?;
        measured.add_hex(format!("vector of an {name}"), taken);
        ensure(taken == vector, || {
            format!("an {name} was taken at {taken:#x} and not at {vector:#x}")
        })?;
        let after = VcpuState::capture(&vcpu)?;
        ensure(!after.pending_irq && !after.pending_fiq, || {
            format!("the exit did not clear the pending {name}")
        })?;
    }
    Ok(())
}

#[cfg(feature = "macos-15")]
use with_gic::{gic, pause};

#[cfg(feature = "macos-15")]
mod with_gic {
    use std::sync::Barrier;
    use std::thread;
    use std::time::{Duration, Instant};

    use hvf_backend::{Exit, GicPlace, GicState, VmOptions};

    use super::*;
    use crate::guest::start_by_registers;

    const VCPUS: usize = 2;

    /// Returns the options of a machine with an interrupt controller.
    fn options() -> VmOptions {
        Vm::options().gic(GicPlace {
            distributor: 0x800_0000,
            redistributors: 0x1000_0000,
        })
    }

    fn joined<T>(ended: thread::Result<Result<T, NotPassed>>) -> Result<T, NotPassed> {
        ended.map_err(|_| NotPassed::Failed("a thread panicked".to_owned()))?
    }

    /// Creates a vCPU with an affinity of its own.
    fn create(vm: &Vm, number: usize) -> Result<hvf_backend::Vcpu, NotPassed> {
        let vcpu = vm.create_vcpu()?;
        start_by_registers(&vcpu, number as u64)?;
        vcpu.set_system_register(SysReg::MPIDR_EL1, 1 << 31 | number as u64)?;
        Ok(vcpu)
    }

    /// Captures a machine with vCPUs on threads of their own.
    fn capture(vm: &Vm) -> Result<(Vec<VcpuState>, GicState), NotPassed> {
        // All vCPUs exist before one is captured, and until the controller is.
        let (created, captured) = (Barrier::new(VCPUS + 1), Barrier::new(VCPUS + 1));
        thread::scope(|scope| {
            let (created, captured) = (&created, &captured);
            let mut threads = Vec::new();
            for number in 0..VCPUS {
                threads.push(scope.spawn(move || {
                    let vcpu = create(vm, number);
                    created.wait();
                    let state = vcpu.and_then(|vcpu| {
                        let state = VcpuState::capture(&vcpu)?;
                        Ok((vcpu, state))
                    });
                    captured.wait();
                    Ok(state?.1)
                }));
            }
            created.wait();
            let gic = vm.capture_gic();
            captured.wait();
            let states = threads.into_iter().map(|thread| joined(thread.join()));
            let states = states.collect::<Result<_, _>>()?;
            Ok((states, gic?))
        })
    }

    pub(super) fn gic(measured: &mut Measured) -> Outcome {
        let sizes = Vm::gic_sizes()?;
        measured.add_hex("size of the distributor", sizes.distributor);
        measured.add_hex("size of all redistributors", sizes.redistributors);
        measured.add("shared interrupts", format!("{:?}", sizes.spis));
        let (states, gic) = capture(&options().create()?)?;
        measured.add("bytes of the controller's state", gic.data().len());
        let (vm, _stage2) = machine(&options(), &[HYPERCALL])?;
        let turns = vm.restore_vcpus(states, Some(gic.clone()))?;
        let again = Barrier::new(VCPUS + 1);
        thread::scope(|scope| {
            let again = &again;
            let mut threads = Vec::new();
            for turn in turns {
                threads.push(scope.spawn(move || {
                    let state = turn.state().clone();
                    let restored = turn.restore();
                    again.wait(); // until the controller is captured
                    again.wait();
                    let (mut vcpu, restored) = restored?;
                    ensure(restored.differing.is_empty(), || {
                        format!("registers were not taken: {restored:x?}")
                    })?;
                    let found = VcpuState::capture(&vcpu)?;
                    ensure(found.gic_cpu == state.gic_cpu, || {
                        "the CPU interface differs".to_owned()
                    })?;
                    hypercall(vcpu.run()?).map(drop)
                }));
            }
            again.wait();
            let captured = vm.capture_gic();
            again.wait();
            for thread in threads {
                joined(thread.join())?;
            }
            measured.add("the state is captured as it was restored", captured? == gic);
            Ok(())
        })
    }

    pub(super) fn pause(measured: &mut Measured) -> Outcome {
        let (vm, _stage2) = machine(&options(), &[0xd503_207f, 0x17ff_ffff])?; // wfi; b .-4
        let created = Barrier::new(VCPUS + 1);
        thread::scope(|scope| {
            let (vm, created) = (&vm, &created);
            let mut threads = Vec::new();
            for number in 0..VCPUS {
                threads.push(scope.spawn(move || {
                    let vcpu = create(vm, number);
                    created.wait();
                    let mut vcpu = vcpu?;
                    for _ in 0..2 {
                        while !vcpu.is_pausing() {
                            let exit = vcpu.run()?;
                            ensure(exit == Exit::Canceled, || {
                                format!("the guest stopped by {exit:x?}")
                            })?;
                        }
                        let _ = VcpuState::capture(&vcpu)?;
                        vcpu.park();
                    }
                    Ok(())
                }));
            }
            created.wait();
            for number in 1..=2 {
                // The guests have probably reached the instruction.
                thread::sleep(Duration::from_millis(50));
                let began = Instant::now();
                let paused = vm.pause()?;
                let time = began.elapsed().as_micros() as u64;
                measured.add(format!("us until pause {number}"), time);
                drop(paused);
            }
            threads
                .into_iter()
                .try_for_each(|thread| joined(thread.join()))
        })
    }
}

#[cfg(not(feature = "macos-15"))]
fn gic(_: &mut Measured) -> Outcome {
    Err(without_feature())
}

#[cfg(not(feature = "macos-15"))]
fn pause(_: &mut Measured) -> Outcome {
    Err(without_feature())
}

#[cfg(not(feature = "macos-15"))]
fn without_feature() -> NotPassed {
    NotPassed::Unsupported("build with `--all-features`".to_owned())
}
