//! Tests with the real framework, on a Mac with Apple silicon, and with the fake one of
//! `testing/fake-hvf` elsewhere (`--cfg hvf_fake`).
#![cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]

mod support;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use dirty_bitmap::{Policy, TrackedBitmap, WriteProtection};
use hvf_backend::{
    Access, CreateVmError, Exit, GuestRam, MapError, PAGE_SIZE, Register, Stage2, SysReg, Vcpu,
    VcpuState, Vm,
};
use page_reader::{PageReader, RamLayout};
use support::{PROGRAM, RAM};
use test_machine::{Need, needs};

const SIZE: u64 = 8 << 20;
const DATA: u64 = RAM + (4 << 20);
const HVC: u64 = 0x16;

/// Serializes the tests that create a virtual machine, because a process can have only one.
fn hypervisor(test: &str) -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    Need::Hypervisor
        .met(test)
        .then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

fn layout() -> RamLayout {
    RamLayout::single(RAM, SIZE).unwrap()
}

/// Creates a machine with the program in its RAM, and a vCPU at its first instruction.
fn machine(code: &[u32]) -> (Vm, Stage2, Vcpu) {
    let vm = Vm::new().unwrap();
    let ram = Arc::new(GuestRam::new(layout()).unwrap());
    support::write_guest(&ram, code);
    let stage2 = Stage2::map(&vm, &ram).unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    support::start(&vcpu);
    (vm, stage2, vcpu)
}

/// `str x0, [x1]; hvc #0; b .-8`
const STORE: [u32; 3] = [0xf900_0020, 0xd400_0002, 0x17ff_fffe];

fn is_hvc(exit: Exit) -> bool {
    matches!(exit, Exit::Exception(exception) if exception.syndrome >> 26 & 0x3f == HVC)
}

#[test]
fn guest_and_host_see_each_others_writes() {
    let Some(_turn) = hypervisor("guest_and_host_see_each_others_writes") else {
        return;
    };
    // ldr x0, [x1]; add x0, x0, #1; str x0, [x1]; hvc #0
    let (_vm, stage2, mut vcpu) = machine(&[0xf940_0020, 0x9100_0400, 0xf900_0020, 0xd400_0002]);
    stage2.ram().write(DATA, &41_u64.to_le_bytes()).unwrap();
    vcpu.set_register(Register::X1, DATA).unwrap();
    assert!(is_hvc(vcpu.run().unwrap()));
    let mut word = [0; 8];
    stage2.ram().read_at(DATA - RAM, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 42);
}

#[test]
fn a_write_faults_until_the_page_is_unprotected() {
    let Some(_turn) = hypervisor("a_write_faults_until_the_page_is_unprotected") else {
        return;
    };
    let (_vm, stage2, mut vcpu) = machine(&STORE);
    let page = DATA - RAM..DATA - RAM + PAGE_SIZE;
    stage2.protect(page.clone()).unwrap();
    stage2.protect(page.clone()).unwrap(); // has no effect
    vcpu.set_register(Register::X0, 7).unwrap();
    vcpu.set_register(Register::X1, DATA + 8).unwrap();
    for _ in 0..2 {
        let Exit::Exception(exception) = vcpu.run().unwrap() else {
            panic!("no exception");
        };
        assert_eq!(Access::of(exception.syndrome), Some(Access::Write));
        assert_eq!(exception.physical_address, DATA + 8);
        // The guest repeats the instruction.
        assert_eq!(vcpu.register(Register::PC).unwrap(), PROGRAM);
    }
    stage2.unprotect(page).unwrap();
    assert!(is_hvc(vcpu.run().unwrap()));
    let mut word = [0; 8];
    stage2.ram().read_at(DATA - RAM + 8, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 7);
}

#[test]
fn the_tracker_marks_exactly_the_written_pages() {
    let Some(_turn) = hypervisor("the_tracker_marks_exactly_the_written_pages") else {
        return;
    };
    let (_vm, stage2, mut vcpu) = machine(&STORE);
    let tracker = stage2.track(Policy::Pages).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
    let written: Vec<u64> = (0..16).map(|n| DATA - RAM + n * n * PAGE_SIZE).collect();
    let written: Vec<u64> = written
        .into_iter()
        .filter(|offset| *offset < SIZE)
        .collect();
    for offset in &written {
        vcpu.set_register(Register::X1, RAM + offset).unwrap();
        let exit = support::run_tracked(&tracker, &mut vcpu);
        assert!(is_hvc(exit), "{exit:x?}");
    }
    let epoch = tracker.checkpoint().unwrap();
    let pages: Vec<u64> = (0..SIZE)
        .step_by(PAGE_SIZE as usize)
        .filter(|offset| epoch.bitmap().is_dirty(*offset).unwrap())
        .collect();
    assert_eq!(pages, written);
}

#[test]
fn a_restored_vcpu_has_the_vector_registers() {
    let Some(_turn) = hypervisor("a_restored_vcpu_has_the_vector_registers") else {
        return;
    };
    // add v0.2d, v0.2d, v0.2d; hvc #0; b .-8
    let (vm, _stage2, mut vcpu) = machine(&[0x4ee0_8400, 0xd400_0002, 0x17ff_fffe]);
    let mut state = VcpuState::capture(&vcpu).unwrap();
    for (number, q) in state.q.iter_mut().enumerate() {
        *q = (0x1111_u128 << 96) | (number as u128 + 1);
    }
    for (number, x) in state.x.iter_mut().enumerate() {
        *x = 0x100 + number as u64;
    }
    let restored = state
        .restore(&vcpu, state.vtimer.resuming_offset())
        .unwrap();
    assert_eq!(restored.differing, []);
    assert!(is_hvc(vcpu.run().unwrap()));
    let captured = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(captured.q[0], state.q[0] * 2);
    assert_eq!(captured.q[1..], state.q[1..]);
    assert_eq!(captured.x, state.x);
    drop(vcpu);

    let mut vcpu = vm.create_vcpu().unwrap();
    let restored = captured
        .restore(&vcpu, captured.vtimer.resuming_offset())
        .unwrap();
    assert_eq!(restored.differing, []);
    let again = VcpuState::capture(&vcpu).unwrap();
    let without_clock = |state: &VcpuState| {
        let mut state = state.clone();
        state.vtimer.counter = 0;
        state
    };
    assert_eq!(without_clock(&again), without_clock(&captured));
    assert!(again.vtimer.counter >= captured.vtimer.counter);
    assert!(is_hvc(vcpu.run().unwrap()));
    assert_eq!(VcpuState::capture(&vcpu).unwrap().q[0], state.q[0] * 4);
}

#[test]
fn system_registers_are_restored() {
    let Some(_turn) = hypervisor("system_registers_are_restored") else {
        return;
    };
    let (vm, _stage2, vcpu) = machine(&STORE);
    vcpu.set_system_register(SysReg::TPIDR_EL1, 0x1234).unwrap();
    vcpu.set_system_register(SysReg::VBAR_EL1, 0x8000_0800)
        .unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    drop(vcpu);
    let vcpu = vm.create_vcpu().unwrap();
    let restored = state.restore(&vcpu, 0).unwrap();
    assert_eq!(restored.differing, []);
    assert_eq!(vcpu.system_register(SysReg::TPIDR_EL1).unwrap(), 0x1234);
    assert_eq!(vcpu.system_register(SysReg::VBAR_EL1).unwrap(), 0x8000_0800);
}

#[test]
fn another_thread_can_cancel_a_run() {
    let Some(_turn) = hypervisor("another_thread_can_cancel_a_run") else {
        return;
    };
    let (_vm, _stage2, mut vcpu) = machine(&[0x1400_0000]); // b .
    let canceller = vcpu.canceller();
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        canceller.cancel().unwrap();
        canceller
    });
    assert_eq!(vcpu.run().unwrap(), Exit::Canceled);
    let canceller = thread.join().unwrap();
    drop(vcpu);
    canceller.cancel().unwrap(); // no effect: the vCPU no longer exists
}

#[test]
fn a_second_machine_in_a_process_is_an_error() {
    let Some(_turn) = hypervisor("a_second_machine_in_a_process_is_an_error") else {
        return;
    };
    let vm = Vm::new().unwrap();
    let error = Vm::new().unwrap_err();
    assert!(matches!(error, CreateVmError::Exists(_)), "{error:?}");
    assert!(error.to_string().contains("process of its own"), "{error}");
    drop(vm);
    let _vm = Vm::new().unwrap();
}

#[test]
fn overlapping_ram_is_an_error_and_stays_unmapped() {
    let Some(_turn) = hypervisor("overlapping_ram_is_an_error_and_stays_unmapped") else {
        return;
    };
    let (vm, _stage2, _vcpu) = machine(&STORE);
    let regions = [(RAM - SIZE, SIZE), (RAM, SIZE)];
    let other = Arc::new(GuestRam::new(RamLayout::new(regions).unwrap()).unwrap());
    let error = Stage2::map(&vm, &other).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::Refused {
                guest_start: RAM,
                ..
            }
        ),
        "{error:?}"
    );
    let lower = Arc::new(GuestRam::new(RamLayout::single(RAM - SIZE, SIZE).unwrap()).unwrap());
    let _lower = Stage2::map(&vm, &lower).unwrap();
}

#[test]
fn pages_smaller_than_those_of_stage_2_are_an_error() {
    let Some(_turn) = hypervisor("pages_smaller_than_those_of_stage_2_are_an_error") else {
        return;
    };
    let vm = Vm::new().unwrap();
    let bitmap = Arc::new(TrackedBitmap::tracked(0, SIZE, 4096).unwrap());
    let ram = Arc::new(
        GuestRam::options()
            .dirty_bitmap(bitmap)
            .allocate(layout())
            .unwrap(),
    );
    let error = Stage2::map(&vm, &ram).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::PageBelowGranule {
                page_size: 4096,
                ..
            }
        ),
        "{error:?}"
    );
}

#[cfg(feature = "macos-15")]
#[test]
fn the_interrupt_controller_is_restored() {
    let Some(_turn) = hypervisor("the_interrupt_controller_is_restored") else {
        return;
    };
    let new = || {
        let vm = Vm::options().gic(support::GIC).create().unwrap();
        let vcpu = vm.create_vcpu().unwrap();
        vcpu.set_system_register(SysReg::MPIDR_EL1, 0x8000_0000)
            .unwrap();
        (vcpu, vm)
    };
    let (vcpu, vm) = new();
    let (gic, state) = (
        vm.capture_gic().unwrap(),
        VcpuState::capture(&vcpu).unwrap(),
    );
    assert!(!gic.data().is_empty() && !state.gic_cpu.is_empty());
    drop((vcpu, vm));
    let (vcpu, vm) = new();
    vm.restore_gic(&gic).unwrap();
    let _ = state.restore(&vcpu, 0).unwrap();
    assert_eq!(VcpuState::capture(&vcpu).unwrap().gic_cpu, state.gic_cpu);
}

/// The variable that is set for the copy of this program without the entitlement.
#[cfg(not(hvf_fake))]
const NOT_ENTITLED: &str = "HVF_BACKEND_TEST_NOT_ENTITLED";
#[cfg(hvf_fake)]
use fake_hvf::control::NOT_ENTITLED;

#[test]
fn a_missing_entitlement_is_an_error_with_the_fix() {
    if std::env::var_os(NOT_ENTITLED).is_some() {
        println!("{}", Vm::new().unwrap_err());
        return;
    }
    let test = "a_missing_entitlement_is_an_error_with_the_fix";
    needs!(Hypervisor);
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("not-entitled");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    // Sign without the entitlement, because Apple silicon does not run unsigned programs.
    if cfg!(target_os = "macos") {
        run(
            Path::new("codesign"),
            &["--sign", "-", "--force"],
            Some(&copy),
        );
    }
    let output = run(&copy, &["--exact", test, "--nocapture"], None);
    let message = String::from_utf8_lossy(&output.stdout);
    assert!(
        message.contains("com.apple.security.hypervisor"),
        "{message}"
    );
}

fn run(program: &Path, arguments: &[&str], file: Option<&Path>) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).args(file).env(NOT_ENTITLED, "1");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}
