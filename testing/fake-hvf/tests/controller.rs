//! What the interrupt controller signals, and how a guest waits for it.
#![cfg(all(hvf_fake, target_os = "linux", target_arch = "x86_64"))]
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "the framework's functions, with variables of the test"
)]

mod support;

use std::ptr;
use std::thread;

use fake_hvf::*;
use support::*;

const MPIDR_EL1: u16 = 0xc005;
const CNTP_CTL_EL0: u16 = 0xdf11;
const CNTP_CVAL_EL0: u16 = 0xdf12;
const ICC_PMR_EL1: u16 = 0xc230;
const ICC_IGRPEN1_EL1: u16 = 0xc667;
const WFI: u32 = 0xd503_207f;
const INTID: u32 = 40;

fn set_distributor(offset: u32, value: u64) {
    done(unsafe { hv_gic_set_distributor_reg(offset, value) }).unwrap();
}

fn distributor(offset: u32) -> u64 {
    got(|value| unsafe { hv_gic_get_distributor_reg(offset, value) }).unwrap()
}

fn set_interface(vcpu: &Vcpu, register: u16, value: u64) {
    done(unsafe { hv_gic_set_icc_reg(vcpu.id, register, value) }).unwrap();
}

/// Creates a vCPU to which an interrupt is signalled once it is pending.
fn vcpu() -> Vcpu {
    let vcpu = Vcpu::new();
    vcpu.set_system(VBAR_EL1, RAM + 0x800).unwrap();
    vcpu.set(CPSR, 0x345);
    set_distributor(0x000, 0b10);
    set_distributor(0x100 + INTID / 32 * 4, 1 << (INTID % 32));
    set_interface(&vcpu, ICC_PMR_EL1, 0xff);
    set_interface(&vcpu, ICC_IGRPEN1_EL1, 1);
    vcpu
}

/// Returns whether the vCPU takes an interrupt before its first instruction.
fn takes(vcpu: &Vcpu) -> bool {
    vcpu.set(PC, RAM);
    vcpu.set(CPSR, 0x345);
    match hypercall(vcpu.run()) {
        0 => false,
        0x280 => true,
        other => panic!("{other:#x}"),
    }
}

/// Returns RAM whose program and interrupt vector each make a hypercall.
fn hypercalls() -> Ram {
    let ram = Ram::new();
    ram.write(RAM, &[hvc(0)]);
    ram.write(RAM + 0x800 + 0x280, &[hvc(0x280)]);
    ram
}

#[test]
fn each_setting_decides_whether_an_interrupt_is_signalled() {
    let _turn = turn();
    let _machine = Machine::with_gic();
    let _ram = hypercalls();
    let vcpu = vcpu();
    assert!(!takes(&vcpu));
    done(unsafe { hv_gic_set_spi(INTID, true) }).unwrap();
    assert!(takes(&vcpu));
    let bit = 1 << (INTID % 32);
    // ISENABLER and ICENABLER are two views of the same bits.
    set_distributor(0x180 + 4, bit);
    assert_eq!((distributor(0x104), distributor(0x184)), (0, 0));
    assert!(!takes(&vcpu));
    set_distributor(0x100 + 4, bit);
    assert_eq!(distributor(0x184), bit);
    // Each of these holds the interrupt back until it is undone.
    let settings = [
        (0x000, 0, 0b10),
        (0x6000 + INTID * 8, 1, 0),
        (0x400 + INTID, 0xff, 0),
    ];
    for (offset, without, with) in settings {
        set_distributor(offset, without);
        assert!(!takes(&vcpu), "{offset:#x}");
        set_distributor(offset, with);
        assert!(takes(&vcpu), "{offset:#x}");
    }
    for (register, with) in [(ICC_PMR_EL1, 0xff), (ICC_IGRPEN1_EL1, 1)] {
        set_interface(&vcpu, register, 0);
        assert!(!takes(&vcpu), "{register:#x}");
        set_interface(&vcpu, register, with);
        assert!(takes(&vcpu), "{register:#x}");
    }
    vcpu.set(PC, RAM);
    vcpu.set(CPSR, 0x3c5);
    assert_eq!(hypercall(vcpu.run()), 0);
}

#[test]
fn an_interrupt_goes_to_the_affinity_of_its_route() {
    let _turn = turn();
    let _machine = Machine::with_gic();
    let _ram = hypercalls();
    let vcpu = vcpu();
    vcpu.set_system(MPIDR_EL1, 1 << 31 | 3).unwrap();
    done(unsafe { hv_gic_set_spi(INTID, true) }).unwrap();
    assert!(!takes(&vcpu));
    set_distributor(0x6000 + INTID * 8, 3);
    assert!(takes(&vcpu));
}

#[test]
fn a_guest_waits_inside_the_framework_with_a_controller() {
    let _turn = turn();
    let _machine = Machine::with_gic();
    let ram = Ram::new();
    ram.write(RAM, &[WFI, hvc(7)]);
    let vcpu = vcpu();
    vcpu.set(CPSR, 0x3c5);
    let id = vcpu.id;
    let wait_for = |call: fn(u64)| {
        thread::scope(|scope| {
            scope.spawn(move || {
                while !control::has_waiting_vcpu() {
                    thread::yield_now();
                }
                // The state is that of stopped vCPUs.
                assert!(unsafe { hv_gic_state_create() }.is_null());
                call(id);
            });
            vcpu.run_any()
        })
    };
    let exit = wait_for(|id| done(unsafe { hv_vcpus_exit(&raw const id, 1) }).unwrap());
    assert_eq!(exit.reason, 0);
    assert_eq!(vcpu.get(PC), RAM);
    // An interrupt that is masked ends the wait too.
    let exit = wait_for(|_| done(unsafe { hv_gic_set_spi(INTID, true) }).unwrap());
    assert_eq!((exit.reason, hypercall(exit.exception)), (1, 7));
}

#[test]
fn a_frame_for_messages_needs_both_settings() {
    let _turn = turn();
    let (frame, distributor) = (0x900_0000, 0x800_0000);
    let create = |frame: Option<u64>, numbers: Option<(u32, u32)>| {
        let machine = Machine::new();
        let config = unsafe { hv_gic_config_create() };
        done(unsafe { hv_gic_config_set_distributor_base(config, distributor) }).unwrap();
        done(unsafe { hv_gic_config_set_redistributor_base(config, 0x1000_0000) }).unwrap();
        if let Some(frame) = frame {
            done(unsafe { hv_gic_config_set_msi_region_base(config, frame) }).unwrap();
        }
        if let Some((first, count)) = numbers {
            let set = unsafe { hv_gic_config_set_msi_interrupt_range(config, first, count) };
            done(set).unwrap();
        }
        let created = done(unsafe { hv_gic_create(config) });
        unsafe { os_release(config) };
        created.map(|()| machine)
    };
    let send = |address, intid| done(unsafe { hv_gic_send_msi(address, intid) });
    for (frame, numbers) in [(Some(frame), None), (None, Some((64, 8)))] {
        let _machine = create(frame, numbers).unwrap();
        assert_eq!(send(0x900_0040, 64), Err(Code::UNSUPPORTED));
    }
    // In the distributor.
    assert!(create(Some(distributor), Some((64, 8))).is_err());
    let _machine = create(Some(frame), Some((64, 8))).unwrap();
    assert_eq!(send(0x900_0040, 64), Ok(()));
    assert_eq!(send(0x900_0040, 63), Err(Code::BAD_ARGUMENT));
    assert_eq!(send(0x900_0000, 64), Err(Code::BAD_ARGUMENT));
    let line = |intid| done(unsafe { hv_gic_set_spi(intid, true) });
    assert_eq!((line(63), line(64)), (Ok(()), Err(Code::BAD_ARGUMENT)));
    assert_eq!(line(31), Err(Code::BAD_ARGUMENT));
}

#[test]
fn numbers_of_messages_are_those_of_shared_interrupts() {
    let _turn = turn();
    let config = unsafe { hv_gic_config_create() };
    for (first, count) in [(31, 8), (1013, 8), (u32::MAX, 8)] {
        let set = unsafe { hv_gic_config_set_msi_interrupt_range(config, first, count) };
        assert_eq!(done(set), Err(Code::BAD_ARGUMENT), "{first}");
    }
    unsafe { os_release(config) };
    let null = unsafe { hv_gic_config_set_msi_region_base(ptr::null_mut(), 0) };
    assert_eq!(done(null), Err(Code::BAD_ARGUMENT));
}

#[test]
fn the_physical_timer_compares_with_the_hosts_counter() {
    let _turn = turn();
    let _machine = Machine::with_gic();
    let vcpu = Vcpu::new();
    control::stop_clock(1_000);
    vcpu.set_system(CNTP_CVAL_EL0, 1_001).unwrap();
    vcpu.set_system(CNTP_CTL_EL0, 1).unwrap();
    assert_eq!(vcpu.system(CNTP_CTL_EL0), Ok(1));
    control::stop_clock(1_001);
    assert_eq!(vcpu.system(CNTP_CTL_EL0), Ok(0b101));
    vcpu.set_system(CNTP_CTL_EL0, 0).unwrap();
    assert_eq!(vcpu.system(CNTP_CTL_EL0), Ok(0));
}
