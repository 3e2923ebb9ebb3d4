//! Interrupts of devices, the physical timer, and vCPUs that wait for an interrupt.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(all(hvf_fake, feature = "macos-15"))]
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "the framework's functions, with variables of the test"
)]

mod support;

use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use fake_hvf::{Code, control};
use hvf_backend::{
    CreateVmError, Exit, GicError, GuestRam, MsiRegion, Register, RestoreError, Stage2, SysReg,
    Vcpu, VcpuState, Vm,
};
use page_reader::RamLayout;

const MSIS: MsiRegion = MsiRegion {
    address: 0x900_0000,
    first_intid: 64,
    count: 8,
};
const RAM: u64 = 0x8000_0000;
const VECTORS: u64 = RAM + 0x800;
const WFI: u32 = 0xd503_207f;
const BRANCH_BACK: u32 = 0x17ff_ffff; // b .-4
const CALL: u64 = RAM + 0x100;
const HVC: u32 = 0xd400_0002 | 2 << 5;
/// PSTATE at level 1 with its own stack pointer. IRQs are not masked.
const UNMASKED: u64 = 0x345;
const HVC_AT_IRQ: u32 = 0xd400_0002 | 0x280 << 5;

/// Creates a machine whose guest only waits for interrupts, and its vCPU.
fn waiting() -> (Stage2, Vcpu) {
    let vm = Vm::options()
        .gic(support::GIC)
        .gic_msis(MSIS)
        .create()
        .unwrap();
    let ram = Arc::new(GuestRam::new(RamLayout::single(RAM, 1 << 20).unwrap()).unwrap());
    let code = [WFI, BRANCH_BACK].map(u32::to_le_bytes).concat();
    ram.write(RAM, &code).unwrap();
    ram.write(CALL, &HVC.to_le_bytes()).unwrap();
    ram.write(VECTORS + 0x280, &HVC_AT_IRQ.to_le_bytes())
        .unwrap();
    let stage2 = Stage2::map(&vm, &ram).unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    vcpu.set_system_register(SysReg::VBAR_EL1, VECTORS).unwrap();
    vcpu.set_register(Register::PC, RAM).unwrap();
    vcpu.set_register(Register::CPSR, UNMASKED).unwrap();
    for (register, value) in [(0xc667, 1), (0xc230, 0xff)] {
        assert_eq!(
            unsafe { fake_hvf::hv_gic_set_icc_reg(vcpu.id(), register, value) },
            0
        );
    }
    (stage2, vcpu)
}

fn set_distributor(offset: u32, value: u64) {
    assert_eq!(
        unsafe { fake_hvf::hv_gic_set_distributor_reg(offset, value) },
        0
    );
}

fn enable(intid: u32) {
    set_distributor(0, 0b10);
    set_distributor(0x100 + intid / 32 * 4, 1 << (intid % 32));
}

fn is_irq(exit: Exit) -> bool {
    matches!(exit, Exit::Exception(exception) if exception.syndrome & 0xffff == 0x280)
}

/// Returns whether an interrupt is signalled to the vCPU.
fn takes_irq(vcpu: &mut Vcpu) -> bool {
    vcpu.set_register(Register::PC, CALL).unwrap();
    vcpu.set_register(Register::CPSR, UNMASKED).unwrap();
    match vcpu.run().unwrap() {
        Exit::Exception(exception) if exception.syndrome & 0xffff == 2 => false,
        exit => {
            assert!(is_irq(exit), "{exit:x?}");
            true
        }
    }
}

/// Calls a function while the vCPU waits for an interrupt inside the framework. Returns its exit.
fn while_it_waits(vcpu: &mut Vcpu, function: impl FnOnce() + Send) -> Exit {
    thread::scope(|scope| {
        scope.spawn(|| {
            while !control::has_waiting_vcpu() {
                thread::yield_now();
            }
            function();
        });
        vcpu.run().unwrap()
    })
}

#[test]
fn vcpu_that_waits_is_cancelled_and_waits_again() {
    let _turn = control::turn();
    let (_stage2, mut vcpu) = waiting();
    for _ in 0..2 {
        let canceller = vcpu.canceller();
        let exit = while_it_waits(&mut vcpu, || canceller.cancel().unwrap());
        assert_eq!(exit, Exit::Canceled);
    }
    // It is captured while it waits in the guest's view.
    let state = VcpuState::capture(&vcpu).unwrap();
    assert!([RAM, RAM + 4].contains(&state.pc), "{:#x}", state.pc);
}

#[test]
fn request_before_a_run_ends_that_run_only() {
    let _turn = control::turn();
    let (_stage2, mut vcpu) = waiting();
    let canceller = vcpu.canceller();
    canceller.cancel().unwrap();
    canceller.cancel().unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Canceled);
    assert!(!takes_irq(&mut vcpu));
}

#[test]
fn line_that_is_raised_wakes_the_vcpu() {
    let _turn = control::turn();
    let (stage2, mut vcpu) = waiting();
    enable(40);
    let vm = stage2.vm();
    let exit = while_it_waits(&mut vcpu, || vm.set_spi(40, true).unwrap());
    assert!(is_irq(exit), "{exit:x?}");
}

#[test]
fn level_of_a_line_is_that_of_the_last_call() {
    let _turn = control::turn();
    let (stage2, mut vcpu) = waiting();
    let vm = stage2.vm();
    enable(40);
    assert!(!takes_irq(&mut vcpu));
    vm.set_spi(40, true).unwrap();
    assert!(takes_irq(&mut vcpu));
    vm.set_spi(40, false).unwrap();
    assert!(!takes_irq(&mut vcpu));
    // Edges: the level that is low has no effect.
    set_distributor(0xc00 + 40 / 16 * 4, 0b10 << (40 % 16 * 2));
    vm.set_spi(40, true).unwrap();
    vm.set_spi(40, false).unwrap();
    assert!(takes_irq(&mut vcpu));
    vm.reset_gic().unwrap();
    assert!(!takes_irq(&mut vcpu));
    // No shared interrupt, and one of a message.
    for intid in [31, MSIS.first_intid] {
        let error = vm.set_spi(intid, true).unwrap_err();
        assert!(matches!(error, GicError::Interrupt(_)), "{error:?}");
    }
}

#[test]
fn message_signals_its_interrupt() {
    let _turn = control::turn();
    let (stage2, mut vcpu) = waiting();
    let vm = stage2.vm();
    enable(65);
    assert_eq!(MSIS.doorbell(), 0x900_0040);
    for (address, intid) in [(MSIS.address, 65), (MSIS.doorbell(), 72)] {
        let error = vm.send_msi(address, intid).unwrap_err();
        assert!(matches!(error, GicError::Interrupt(_)), "{error:?}");
    }
    assert!(!takes_irq(&mut vcpu));
    vm.send_msi(MSIS.doorbell(), 65).unwrap();
    assert!(takes_irq(&mut vcpu));
}

#[test]
fn region_for_messages_has_shared_interrupts() {
    let _turn = control::turn();
    let region = MsiRegion {
        first_intid: 1015,
        ..MSIS
    };
    let error = Vm::options().gic(support::GIC).gic_msis(region).create();
    let error = error.unwrap_err();
    assert!(matches!(error, CreateVmError::Refused(_)), "{error:?}");
}

#[test]
fn interrupts_need_a_controller() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    for result in [vm.set_spi(40, true), vm.send_msi(0, 65), vm.reset_gic()] {
        let error = result.unwrap_err();
        assert!(matches!(error, GicError::NoGic), "{error:?}");
    }
}

#[test]
fn sizes_are_those_of_the_framework() {
    let _turn = control::turn();
    let sizes = Vm::gic_sizes().unwrap();
    assert_eq!(sizes.distributor, 64 << 10);
    assert_eq!(sizes.redistributor, 128 << 10);
    assert_eq!(sizes.redistributors, 32 << 20);
    assert_eq!(sizes.msi_region, 64 << 10);
    assert_eq!(sizes.spis, 32..1020);
    let alignments = [
        sizes.distributor_alignment,
        sizes.redistributors_alignment,
        sizes.msi_region_alignment,
    ];
    assert_eq!(alignments, [64 << 10; 3]);
    control::fail("hv_gic_get_msi_region_size", 1, Code::FAULT);
    let error = Vm::gic_sizes().unwrap_err().to_string();
    assert!(error.contains("hv_gic_get_msi_region_size"), "{error}");
}

#[test]
fn physical_timer_fires_after_the_same_time() {
    let _turn = control::turn();
    control::stop_clock(1 << 40);
    let (stage2, vcpu) = waiting();
    let compare = (1 << 40) + 1_000;
    vcpu.set_system_register(SysReg::CNTP_CVAL_EL0, compare)
        .unwrap();
    vcpu.set_system_register(SysReg::CNTP_CTL_EL0, 0b01)
        .unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    let timer = state.physical_timer.unwrap();
    assert_eq!((timer.control, timer.fires_in), (0b01, 1_000));
    drop((vcpu, stage2));

    // After a restart of the host.
    control::stop_clock(500);
    let (_stage2, vcpu) = waiting();
    let _ = state.restore(&vcpu, 0).unwrap();
    assert_eq!(vcpu.system_register(SysReg::CNTP_CVAL_EL0).unwrap(), 1_500);
    assert_eq!(vcpu.system_register(SysReg::CNTP_CTL_EL0).unwrap(), 0b01);
    control::stop_clock(1_500);
    assert_eq!(vcpu.system_register(SysReg::CNTP_CTL_EL0).unwrap(), 0b101);
    // The status is not part of the state.
    let again = VcpuState::capture(&vcpu).unwrap().physical_timer.unwrap();
    assert_eq!((again.control, again.fires_in), (0b01, 0));
}

#[test]
fn vcpu_without_physical_timer_has_none() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(state.physical_timer, None);
    drop((vcpu, vm));

    let (_stage2, vcpu) = waiting();
    let calls = || control::counts()["hv_vcpu_get_sys_reg"];
    let before = calls();
    let state = VcpuState::capture(&vcpu).unwrap();
    assert!(state.physical_timer.is_some());
    // The last two calls are for the timer.
    let control_register = calls() - before - 1;
    control::fail("hv_vcpu_get_sys_reg", control_register, Code::BAD_ARGUMENT);
    let state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(state.physical_timer, None);
    assert_eq!(state.restore(&vcpu, 0).unwrap().differing, []);
}

#[test]
fn refused_physical_timer_is_an_error() {
    let _turn = control::turn();
    let (_stage2, vcpu) = waiting();
    let state = VcpuState::capture(&vcpu).unwrap();
    control::fail_from("hv_vcpu_set_sys_reg", 1, Code::UNSUPPORTED);
    let error = state.restore(&vcpu, 0).unwrap_err();
    let named = matches!(&error, RestoreError::Register { register, .. }
        if register == "CNTP_CVAL_EL0");
    assert!(named, "{error:?}");
}

/// Runs a vCPU as a VMM does, until the last of three pauses: it captures the state in each.
fn run_until_the_last_pause(vcpu: &mut Vcpu, states: &Mutex<Vec<VcpuState>>) {
    for _ in 0..PAUSES {
        while !vcpu.is_pausing() {
            assert_eq!(vcpu.run().unwrap(), Exit::Canceled);
        }
        // It does not enter the guest.
        assert_eq!(vcpu.run().unwrap(), Exit::Canceled);
        states
            .lock()
            .unwrap()
            .push(VcpuState::capture(vcpu).unwrap());
        vcpu.park();
    }
}

const PAUSES: usize = 3;
const THREADS: usize = 4;

#[test]
fn pause_waits_until_all_vcpus_are_parked() {
    let _turn = control::turn();
    let (stage2, own) = waiting();
    let vm = stage2.vm();
    let states = Mutex::new(Vec::new());
    let created = Barrier::new(THREADS + 1);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut vcpu = vm.create_vcpu().unwrap();
                vcpu.set_register(Register::PC, RAM).unwrap();
                vcpu.set_register(Register::CPSR, UNMASKED).unwrap();
                created.wait();
                run_until_the_last_pause(&mut vcpu, &states);
            });
        }
        created.wait();
        for pause in 1..=PAUSES {
            // In the first pause, some wait for an interrupt inside the framework.
            while pause == 1 && !control::has_waiting_vcpu() {
                thread::yield_now();
            }
            let paused = vm.pause().unwrap();
            assert_eq!(states.lock().unwrap().len(), pause * THREADS);
            assert!(!control::has_waiting_vcpu());
            // No vCPU runs, so the framework gives its state.
            let _ = vm.capture_gic().unwrap();
            // A second pause in the first has nothing to wait for, and does not end it.
            drop(vm.pause().unwrap());
            assert!(own.is_pausing());
            assert_eq!(states.lock().unwrap().len(), pause * THREADS);
            drop(paused);
        }
    });
    // Of vCPUs that no longer exist, there is nothing to wait for.
    drop(vm.pause().unwrap());
}

#[test]
fn paused_vcpu_does_not_enter_the_guest() {
    let _turn = control::turn();
    let (stage2, mut vcpu) = waiting();
    // The vCPU is of this thread.
    let paused = stage2.vm().pause().unwrap();
    vcpu.set_register(Register::PC, CALL).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Canceled);
    assert_eq!(vcpu.register(Register::PC).unwrap(), CALL);
    drop(paused);
    assert!(!takes_irq(&mut vcpu));
}

#[test]
fn pause_that_is_refused_ends() {
    let _turn = control::turn();
    let (stage2, _own) = waiting();
    let vm = stage2.vm();
    let (created, checked) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut vcpu = vm.create_vcpu().unwrap();
            created.wait();
            checked.wait();
            assert!(!vcpu.is_pausing());
            vcpu.park(); // returns at once
        });
        created.wait();
        control::fail("hv_vcpus_exit", 1, Code::FAULT);
        let error = vm.pause().unwrap_err();
        assert_eq!(error.call, "hv_vcpus_exit");
        checked.wait();
    });
}

#[test]
fn before_macos_15_there_are_no_sizes() {
    let _turn = control::turn();
    control::set_system(control::System::MacOs13);
    let error = Vm::gic_sizes().unwrap_err().to_string();
    let text = "this macOS has no hv_gic_get_spi_interrupt_range, which macOS 15.0 and later have";
    assert!(error.contains(text), "{error}");
}
