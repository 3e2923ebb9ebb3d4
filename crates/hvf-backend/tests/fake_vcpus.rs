//! Restoring several vCPUs with the framework's interrupt controller, each on its own thread.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(all(hvf_fake, feature = "macos-15"))]
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "the framework's functions, with variables of the test"
)]

mod support;

use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use fake_hvf::{Code, control};
use hvf_backend::{
    Exit, GicState, GuestRam, Register, RestoreError, RestoreVcpuError, Stage2, SysReg, Vcpu,
    VcpuState, VcpuTurnsError, Vm,
};
use page_reader::RamLayout;
use rstest::rstest;

const RAM: u64 = 0x8000_0000;
const SIZE: u64 = 1 << 20;
const VECTORS: u64 = RAM + 0x800;
const IRQ_VECTOR: u64 = 0x280;

/// The shared interrupts that are pending: one for each vCPU with an odd number.
const FIRST_INTID: u32 = 40;

const fn hvc(number: u32) -> u32 {
    0xd400_0002 | number << 5
}

/// Returns the operand of the hypercall.
fn hypercall(exit: Exit) -> u64 {
    match exit {
        Exit::Exception(exception) if exception.syndrome >> 26 == 0x16 => {
            exception.syndrome & 0xffff
        }
        other => panic!("{other:x?}"),
    }
}

/// Creates a machine with a program that makes hypercall 1, enables interrupts, and makes
/// hypercall 2.
fn machine() -> (Vm, Stage2) {
    let vm = Vm::options().gic(support::GIC).create().unwrap();
    let ram = Arc::new(GuestRam::new(RamLayout::single(RAM, SIZE).unwrap()).unwrap());
    let code = [
        hvc(1),
        0xd503_42ff, // msr daifclr, #2
        0xd503_3fdf, // isb
        hvc(2),
    ];
    ram.write(RAM, &code.map(u32::to_le_bytes).concat())
        .unwrap();
    let handler = hvc(IRQ_VECTOR as u32).to_le_bytes();
    ram.write(VECTORS + IRQ_VECTOR, &handler).unwrap();
    let stage2 = Stage2::map(&vm, &ram).unwrap();
    (vm, stage2)
}

/// Returns the affinity of a vCPU, in another order than that of creation.
fn affinity(number: u32, count: u32) -> u64 {
    1 << 31 | u64::from(count - 1 - number)
}

/// Sets the distributor's registers: an interrupt for each vCPU is enabled, and routed to it.
fn set_distributor(count: u32) {
    let set = |offset, value| {
        assert_eq!(
            unsafe { fake_hvf::hv_gic_set_distributor_reg(offset, value) },
            0
        );
    };
    set(0, 0b10); // GICD_CTLR.EnableGrp1
    for number in 0..count {
        let intid = FIRST_INTID + number;
        set(0x6000 + intid * 8, affinity(number, count) & 0xff);
        set(0x100 + intid / 32 * 4, 1 << (intid % 32));
    }
}

/// Creates a vCPU of a guest, and runs it until its first hypercall.
fn boot(vm: &Vm, number: u32, count: u32) -> Vcpu {
    let mut vcpu = vm.create_vcpu().unwrap();
    assert_eq!(vcpu.creation_index(), number);
    vcpu.set_system_register(SysReg::MPIDR_EL1, affinity(number, count))
        .unwrap();
    vcpu.set_system_register(SysReg::VBAR_EL1, VECTORS).unwrap();
    vcpu.set_register(Register::PC, RAM).unwrap();
    vcpu.set_register(Register::CPSR, 0x3c5).unwrap();
    vcpu.set_register(Register::X0, number.into()).unwrap();
    // ICC_IGRPEN1_EL1 and ICC_PMR_EL1
    for (register, value) in [(0xc667, 1), (0xc230, 0xff)] {
        assert_eq!(
            unsafe { fake_hvf::hv_gic_set_icc_reg(vcpu.id(), register, value) },
            0
        );
    }
    assert_eq!(hypercall(vcpu.run().unwrap()), 1);
    vcpu
}

/// Runs a guest of several vCPUs and captures it, with an interrupt pending for each vCPU that has
/// an odd number.
fn capture(count: u32) -> (Vec<VcpuState>, GicState) {
    let (vm, _stage2) = machine();
    set_distributor(count);
    let created = Mutex::new(0);
    let together = Barrier::new(count as usize + 1);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for number in 0..count {
            let (vm, created, together) = (&vm, &created, &together);
            let thread = scope.spawn(move || {
                let vcpu = loop {
                    let mut created = created.lock().unwrap();
                    if *created == number {
                        *created += 1;
                        break boot(vm, number, count);
                    }
                    drop(created);
                    thread::yield_now();
                };
                together.wait();
                together.wait();
                let state = VcpuState::capture(&vcpu).unwrap();
                together.wait();
                state
            });
            threads.push(thread);
        }
        together.wait();
        for number in (1..count).step_by(2) {
            vm.set_spi(FIRST_INTID + number, true).unwrap();
        }
        together.wait();
        let gic = vm.capture_gic().unwrap();
        together.wait();
        let states = threads.into_iter().map(|thread| thread.join().unwrap());
        (states.collect(), gic)
    })
}

/// What a restored vCPU is, and what it does next.
#[derive(Debug, PartialEq, Eq)]
struct Continued {
    index: u32,
    x0: u64,
    affinity: u64,
    redistributor: u64,
    hypercall: u64,
    vtimer_offset: u64,
}

fn continue_guest(vcpu: &mut Vcpu) -> Continued {
    let (mut redistributor, mut vtimer_offset) = (0, 0);
    let id = vcpu.id();
    let codes = unsafe {
        [
            fake_hvf::hv_gic_get_redistributor_base(id, &raw mut redistributor),
            fake_hvf::hv_vcpu_get_vtimer_offset(id, &raw mut vtimer_offset),
        ]
    };
    assert_eq!(codes, [0, 0]);
    Continued {
        index: vcpu.creation_index(),
        x0: vcpu.register(Register::X0).unwrap(),
        affinity: vcpu.system_register(SysReg::MPIDR_EL1).unwrap(),
        redistributor,
        hypercall: hypercall(vcpu.run().unwrap()),
        vtimer_offset,
    }
}

#[rstest]
fn vcpus_continue_with_their_interrupts(#[values(1, 2, 4)] count: u32) {
    let _turn = control::turn();
    let (mut states, gic) = capture(count);
    // The order of the states does not matter, nor that of the threads.
    states.reverse();
    let (vm, _stage2) = machine();
    let mut turns = vm.restore_vcpus(states, Some(gic)).unwrap();
    turns.reverse();
    assert_eq!(turns[0].state().creation_index, Some(count - 1));
    let together = Barrier::new(count as usize);
    let mut continued: Vec<Continued> = thread::scope(|scope| {
        let threads = turns.into_iter().map(|turn| {
            let together = &together;
            scope.spawn(move || {
                let (mut vcpu, restored) = turn.restore().unwrap();
                assert_eq!(restored.differing, []);
                let continued = continue_guest(&mut vcpu);
                together.wait();
                continued
            })
        });
        let threads: Vec<_> = threads.collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    continued.sort_by_key(|vcpu| vcpu.index);
    let vtimer_offset = continued[0].vtimer_offset;
    let expected = |index: u32| Continued {
        index,
        x0: index.into(),
        affinity: affinity(index, count),
        redistributor: support::GIC.redistributors + u64::from(index) * (128 << 10),
        hypercall: if index % 2 == 1 { IRQ_VECTOR } else { 2 },
        vtimer_offset,
    };
    assert_eq!(continued, (0..count).map(expected).collect::<Vec<_>>());
    assert_eq!(control::counts()["hv_gic_set_state"], 1);
}

/// Restores all vCPUs but those of a range. Returns the errors of the others.
fn restore_errors(
    states: Vec<VcpuState>,
    gic: GicState,
    dropped: Range<usize>,
) -> Vec<RestoreVcpuError> {
    let (vm, _stage2) = machine();
    let mut turns = vm.restore_vcpus(states, Some(gic)).unwrap();
    thread::scope(|scope| {
        drop(turns.drain(dropped));
        let threads = turns
            .into_iter()
            .map(|turn| scope.spawn(|| turn.restore().map(drop)));
        let threads: Vec<_> = threads.collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.filter_map(Result::err).collect()
    })
}

#[rstest]
fn turn_that_is_dropped_fails_the_others(#[values(0, 1, 2)] dropped: usize) {
    let _turn = control::turn();
    let (states, gic) = capture(3);
    let errors = restore_errors(states, gic, dropped..dropped + 1);
    assert_eq!(errors.len(), 2);
    let others = errors
        .iter()
        .all(|error| matches!(error, RestoreVcpuError::Other));
    assert!(others, "{errors:?}");
}

#[rstest]
#[case::creation("hv_vcpu_create", 2)]
#[case::affinity("hv_vcpu_set_sys_reg", 2)]
#[case::controller("hv_gic_set_state", 1)]
#[case::state("hv_gic_set_icc_reg", 5)]
fn vcpu_that_fails_fails_the_others(#[case] call: &str, #[case] number: u64) {
    let _turn = control::turn();
    let (states, gic) = capture(4);
    control::fail(call, number, Code::FAULT);
    let errors = restore_errors(states, gic, 0..0);
    assert_eq!(errors.len(), 4);
    let own = |error: &&RestoreVcpuError| !matches!(error, RestoreVcpuError::Other);
    let own: Vec<_> = errors.iter().filter(own).collect();
    assert_eq!(own.len(), 1, "{errors:?}");
    assert!(own[0].to_string().contains(call), "{}", own[0]);
}

#[test]
fn states_that_are_not_of_one_machine_are_refused() {
    let _turn = control::turn();
    let (states, gic) = capture(2);
    let (vm, _stage2) = machine();
    let refused = |states: &[VcpuState]| {
        let turns = vm.restore_vcpus(states.to_vec(), Some(gic.clone()));
        turns.unwrap_err()
    };
    let error = refused(&states[1..]);
    let expected = matches!(
        error,
        VcpuTurnsError::CreationOrder {
            expected: 0,
            found: Some(1)
        }
    );
    assert!(expected, "{error:?}");
    let error = refused(&[states[0].clone(), states[0].clone()]);
    let expected = matches!(
        error,
        VcpuTurnsError::CreationOrder {
            expected: 1,
            found: Some(0)
        }
    );
    assert!(expected, "{error:?}");
    let mut same = states.clone();
    same[1].system = same[0].system.clone();
    let error = refused(&same);
    let expected = matches!(
        error,
        VcpuTurnsError::SameAffinity {
            first: 0,
            second: 1
        }
    );
    assert!(expected, "{error:?}");
    let error = refused(&[VcpuState::default()]);
    assert!(
        error.to_string().contains("one without a number"),
        "{error}"
    );
    let error = vm.restore_vcpus(states.clone(), None).unwrap_err();
    let expected = matches!(error, VcpuTurnsError::Gic { captured: false });
    assert!(expected, "{error:?}");
    drop(vm.create_vcpu().unwrap());
    let error = refused(&states);
    let expected = matches!(error, VcpuTurnsError::VcpusExist { created: 1 });
    assert!(expected, "{error:?}");
}

#[test]
fn vcpus_without_controller_get_their_states() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let mut states = vec![VcpuState::default(), VcpuState::default()];
    (states[0].x[0], states[1].x[0]) = (1, 2);
    let turns = vm.restore_vcpus(states, None).unwrap();
    let found: Vec<u64> = thread::scope(|scope| {
        let threads = turns.into_iter().map(|turn| {
            scope.spawn(|| {
                let (vcpu, _) = turn.restore().unwrap();
                vcpu.register(Register::X0).unwrap()
            })
        });
        let threads: Vec<_> = threads.collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(found, [1, 2]);
}

#[test]
fn state_of_another_vcpu_is_refused() {
    let _turn = control::turn();
    let (states, _gic) = capture(2);
    let (vm, _stage2) = machine();
    let vcpu = vm.create_vcpu().unwrap();
    let error = states[1].restore(&vcpu, 0).unwrap_err();
    let expected = matches!(
        error,
        RestoreError::CreationOrder {
            captured: 1,
            found: 0
        }
    );
    assert!(expected, "{error:?}");
}
