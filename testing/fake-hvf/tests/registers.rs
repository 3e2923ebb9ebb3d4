//! Registers of vCPUs and of the interrupt controller.
#![cfg(all(hvf_fake, target_os = "linux", target_arch = "x86_64"))]
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "the framework's functions, with variables of the test"
)]

mod support;

use std::sync::Barrier;
use std::thread;

use fake_hvf::control::{self, System};
use fake_hvf::*;
use support::*;

const MPIDR_EL1: u16 = 0xc005;
const SP_EL0: u16 = 0xc208;
const SP_EL1: u16 = 0xe208;
const CNTP_CVAL_EL0: u16 = 0xdf12;

#[test]
fn vectors_are_passed_in_vector_registers() {
    let _turn = turn();
    let _machine = Machine::new();
    let vcpu = Vcpu::new();
    let value = 0x1111_2222_3333_4444_5555_6666_7777_8888_u128;
    let vector = unsafe { std::mem::transmute::<u128, std::arch::x86_64::__m128i>(value) };
    done(unsafe { hv_vcpu_set_simd_fp_reg(vcpu.id, 31, vector) }).unwrap();
    let read = got(|value| unsafe { hv_vcpu_get_simd_fp_reg(vcpu.id, 31, value) });
    assert_eq!(read, Ok(value));
    let unknown = got(|value: *mut u128| unsafe { hv_vcpu_get_simd_fp_reg(vcpu.id, 32, value) });
    assert_eq!(unknown, Err(Code::BAD_ARGUMENT));
}

#[test]
fn the_stack_pointer_follows_the_level() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    vcpu.set_system(SP_EL0, 0x10).unwrap();
    vcpu.set_system(SP_EL1, 0x20).unwrap();
    ram.write(RAM, &[0x9100_03e0, hvc(0)]); // mov x0, sp
    for (level, pointer) in [(0x3c5, 0x20), (0x3c4, 0x10), (0x3c5, 0x20)] {
        vcpu.set(CPSR, level);
        vcpu.set(PC, RAM);
        assert_eq!(hypercall(vcpu.run()), 0);
        assert_eq!(vcpu.get(X0), pointer);
        assert_eq!(
            (vcpu.system(SP_EL0), vcpu.system(SP_EL1)),
            (Ok(0x10), Ok(0x20))
        );
    }
}

#[test]
fn guest_and_host_see_the_same_system_registers() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    let tpidr = 0xc684;
    // mrs x0, tpidr_el1; add x1, x0, #1; msr tpidr_el1, x1; mrs x2, id_aa64pfr1_el1; hvc
    ram.write(
        RAM,
        &[0xd538_d080, 0x9100_0401, 0xd518_d081, 0xd538_0422, hvc(0)],
    );
    vcpu.set_system(tpidr, 0x1234).unwrap();
    assert_eq!(hypercall(vcpu.run()), 0);
    assert_eq!(vcpu.get(X0), 0x1234);
    assert_eq!(vcpu.system(tpidr), Ok(0x1235));
    assert_eq!(vcpu.get(2), vcpu.system(0xc021).unwrap());
}

#[test]
fn a_vcpu_has_the_registers_that_it_should() {
    let _turn = turn();
    let _machine = Machine::new();
    let vcpu = Vcpu::new();
    // 6 breakpoints and 4 watchpoints, by ID_AA64DFR0_EL1.
    let (breakpoint, watchpoint) = (|n: u16| 0x8004 | n << 3, |n: u16| 0x8006 | n << 3);
    assert!(vcpu.system(breakpoint(5)).is_ok() && vcpu.system(watchpoint(3)).is_ok());
    assert_eq!(vcpu.system(breakpoint(6)), Err(Code::BAD_ARGUMENT));
    assert_eq!(vcpu.set_system(watchpoint(4), 0), Err(Code::BAD_ARGUMENT));
    let vbar_el2 = 0xe600;
    assert_eq!(vcpu.system(vbar_el2), Err(Code::BAD_ARGUMENT));
    assert_eq!(vcpu.set_system(MPIDR_EL1, 1), Ok(()));
    assert_eq!(vcpu.system(MPIDR_EL1), Ok(1 << 31 | 1));
    let (actlr, tpidr2) = (0xc081, 0xde85);
    for (system, has_actlr, has_tpidr2) in [
        (System::MacOs13, false, false),
        (System::MacOs15, true, false),
        (System::MacOs15_2, true, true),
    ] {
        control::set_system(system);
        assert_eq!(vcpu.system(actlr).is_ok(), has_actlr, "{system:?}");
        assert_eq!(vcpu.system(tpidr2).is_ok(), has_tpidr2, "{system:?}");
    }
    control::set_system(System::MacOs26);
}

#[test]
fn the_physical_timer_needs_an_interrupt_controller() {
    let _turn = turn();
    let machine = Machine::new();
    let vcpu = Vcpu::new();
    assert_eq!(vcpu.system(CNTP_CVAL_EL0), Err(Code::BAD_ARGUMENT));
    drop((vcpu, machine));
    let _machine = Machine::with_gic();
    let vcpu = Vcpu::new();
    vcpu.set_system(CNTP_CVAL_EL0, 7).unwrap();
    assert_eq!(vcpu.system(CNTP_CVAL_EL0), Ok(7));
}

#[test]
fn a_controller_is_created_before_the_vcpus() {
    let _turn = turn();
    let _machine = Machine::new();
    let _vcpu = Vcpu::new();
    let config = unsafe { hv_gic_config_create() };
    let distributor = |base| done(unsafe { hv_gic_config_set_distributor_base(config, base) });
    assert_eq!(distributor(4096), Err(Code::BAD_ARGUMENT));
    distributor(0x800_0000).unwrap();
    assert_eq!(
        done(unsafe { hv_gic_create(config) }),
        Err(Code::BAD_ARGUMENT)
    );
    done(unsafe { hv_gic_config_set_redistributor_base(config, 0x1000_0000) }).unwrap();
    assert_eq!(done(unsafe { hv_gic_create(config) }), Err(Code::BUSY));
    unsafe { os_release(config) };
    assert!(unsafe { hv_gic_state_create() }.is_null());
}

/// Returns the controller's state.
fn gic_state() -> Vec<u8> {
    let state = unsafe { hv_gic_state_create() };
    let size = got(|size| unsafe { hv_gic_state_get_size(state, size) }).unwrap();
    let mut data = vec![0; size];
    done(unsafe { hv_gic_state_get_data(state, data.as_mut_ptr().cast()) }).unwrap();
    unsafe { os_release(state) };
    data
}

fn set_gic_state(state: &[u8]) -> Result<(), Code> {
    done(unsafe { hv_gic_set_state(state.as_ptr().cast(), state.len()) })
}

const IGROUPR0: u32 = 0x10080;

#[test]
fn a_controllers_state_is_set_before_the_first_run() {
    let _turn = turn();
    let machine = Machine::with_gic();
    let vcpu = Vcpu::new();
    vcpu.set_system(MPIDR_EL1, 5).unwrap();
    done(unsafe { hv_gic_set_redistributor_reg(vcpu.id, IGROUPR0, 0xff) }).unwrap();
    done(unsafe { hv_gic_set_distributor_reg(0, 0x13) }).unwrap();
    let state = gic_state();
    drop((vcpu, machine));

    let _machine = Machine::with_gic();
    let vcpu = Vcpu::new();
    // Another affinity than that of the state.
    assert_eq!(set_gic_state(&state), Err(Code::BAD_ARGUMENT));
    vcpu.set_system(MPIDR_EL1, 5).unwrap();
    assert_eq!(
        set_gic_state(&state[..state.len() - 8]),
        Err(Code::BAD_ARGUMENT)
    );
    assert_eq!(set_gic_state(&state), Ok(()));
    let read = got(|value| unsafe { hv_gic_get_redistributor_reg(vcpu.id, IGROUPR0, value) });
    assert_eq!(read, Ok(0xff));
    assert_eq!(
        got(|value| unsafe { hv_gic_get_distributor_reg(0, value) }),
        Ok(0x13)
    );
    vcpu.cancel();
    let _ = vcpu.run_any();
    assert_eq!(set_gic_state(&state), Err(Code::ERROR));
}

#[test]
fn two_vcpus_of_one_affinity_take_no_state() {
    let _turn = turn();
    let _machine = Machine::with_gic();
    let (created, checked) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| {
        scope.spawn(|| {
            let _vcpu = Vcpu::new();
            created.wait();
            checked.wait();
        });
        created.wait();
        let vcpu = Vcpu::new();
        let state = gic_state();
        assert_eq!(set_gic_state(&state), Err(Code::BAD_ARGUMENT));
        vcpu.set_system(MPIDR_EL1, 1).unwrap();
        assert_eq!(set_gic_state(&gic_state()), Ok(()));
        checked.wait();
    });
}

#[test]
fn redistributors_follow_the_order_of_creation() {
    let _turn = turn();
    let _machine = Machine::with_gic();
    let created = Barrier::new(2);
    let base =
        |vcpu: &Vcpu| got(|base| unsafe { hv_gic_get_redistributor_base(vcpu.id, base) }).unwrap();
    thread::scope(|scope| {
        let first = scope.spawn(|| {
            let vcpu = Vcpu::new();
            // The affinity does not matter.
            vcpu.set_system(MPIDR_EL1, 1).unwrap();
            created.wait();
            created.wait();
            base(&vcpu)
        });
        created.wait();
        let second = Vcpu::new();
        created.wait();
        let (first, second) = (first.join().unwrap(), base(&second));
        // Once the first vCPU is gone, the second one is the first.
        assert_eq!((first, second), (0x1000_0000, 0x1000_0000));
    });
}

#[test]
fn the_cpu_interface_is_not_in_the_controllers_state() {
    let _turn = turn();
    let _machine = Machine::with_gic();
    let vcpu = Vcpu::new();
    let (priority_mask, running_priority) = (0xc230, 0xc65b);
    let get = |register| got(|value| unsafe { hv_gic_get_icc_reg(vcpu.id, register, value) });
    let set = |register, value| done(unsafe { hv_gic_set_icc_reg(vcpu.id, register, value) });
    let state = gic_state();
    set(priority_mask, 0xf0).unwrap();
    assert_eq!(gic_state(), state);
    set_gic_state(&state).unwrap();
    assert_eq!(get(priority_mask), Ok(0xf0));
    assert_eq!(set(running_priority, 0), Err(Code::BAD_ARGUMENT));
    assert!(get(running_priority).is_ok());
}

#[test]
fn sme_registers_need_their_modes() {
    let _turn = turn();
    let _machine = Machine::new();
    let vcpu = Vcpu::new();
    let size = got(|size| unsafe { hv_sme_config_get_max_svl_bytes(size) }).unwrap();
    let mut vector = vec![7_u8; size];
    let bytes = vector.as_mut_ptr();
    let set_z = || done(unsafe { hv_vcpu_set_sme_z_reg(vcpu.id, 3, bytes, size) });
    assert_eq!(set_z(), Err(Code::ILLEGAL_GUEST_STATE));
    let za = || done(unsafe { hv_vcpu_get_sme_zt0_reg(vcpu.id, bytes) });
    assert_eq!(za(), Err(Code::ILLEGAL_GUEST_STATE));
    let state = SmeState {
        streaming_sve_mode_enabled: true,
        za_storage_enabled: false,
    };
    done(unsafe { hv_vcpu_set_sme_state(vcpu.id, &raw const state) }).unwrap();
    assert_eq!(vcpu.get(FPSR), 0x0800_009f);
    assert_eq!(set_z(), Ok(()));
    let short = unsafe { hv_vcpu_set_sme_z_reg(vcpu.id, 3, bytes, size - 1) };
    assert_eq!(done(short), Err(Code::BAD_ARGUMENT));
    // Q3 is the lowest part of Z3.
    let q = got(|value| unsafe { hv_vcpu_get_simd_fp_reg(vcpu.id, 3, value) });
    assert_eq!(q, Ok(u128::from_le_bytes([7; 16])));
    assert_eq!(za(), Err(Code::ILLEGAL_GUEST_STATE));
    let state = SmeState::default();
    done(unsafe { hv_vcpu_set_sme_state(vcpu.id, &raw const state) }).unwrap();
    let q = got(|value: *mut u128| unsafe { hv_vcpu_get_simd_fp_reg(vcpu.id, 3, value) });
    assert_eq!(q, Ok(0));
    control::set_sme(false);
    let state = got(|state: *mut SmeState| unsafe { hv_vcpu_get_sme_state(vcpu.id, state) });
    assert_eq!(state, Err(Code::UNSUPPORTED));
    control::set_sme(true);
}
