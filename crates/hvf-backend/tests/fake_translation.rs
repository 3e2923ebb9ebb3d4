//! Guests that translate their addresses by page tables of their own.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

mod support;

use std::sync::Arc;

use dirty_bitmap::Policy;
use fake_hvf::control;
use fake_hvf::tables::{ACCESSED, DIRTY_MODIFIER, READ_ONLY, Tables};
use hvf_backend::{Exit, GuestRam, PAGE_SIZE, Register, Stage2, Stage2Tracker, SysReg, Vcpu, Vm};
use page_reader::RamLayout;
use support::{RAM, run_tracked, start};

const SIZE: u64 = 8 << 20;
/// Guest-physical addresses of the program, the tables and the data.
const CODE: u64 = RAM + PAGE_SIZE;
const LOWER: u64 = RAM + (1 << 20);
const UPPER: u64 = RAM + (2 << 20);
const DATA: u64 = RAM + (4 << 20);

/// Virtual addresses of the program and of the data.
const CODE_AT: u64 = 0x40_0000;
const DATA_AT: u64 = u64::MAX << 39 | 0x1234_0000;

const ID_AA64MMFR1_EL1: u16 = 0xc039;

/// Creates a machine whose guest stores x0 to the address in x1, and makes a hypercall. Data of
/// `pages` pages is mapped from [`DATA_AT`] on, in the reverse order of its physical pages.
fn machine(pages: u64, attributes: u64) -> (Vm, Stage2Tracker<Stage2>, Vcpu, Tables) {
    let vm = Vm::new().unwrap();
    let ram = Arc::new(GuestRam::new(RamLayout::single(RAM, SIZE).unwrap()).unwrap());
    support::write_guest(&ram, &[0xf900_0020, 0xd400_0002, 0x17ff_fffe]);
    let mut lower = Tables::new(14, 39, LOWER);
    let mut upper = Tables::new(14, 39, UPPER);
    lower.map(CODE_AT, CODE, ACCESSED);
    for page in 0..pages {
        let physical = DATA + (pages - 1 - page) * PAGE_SIZE;
        upper.map(DATA_AT + page * PAGE_SIZE, physical, attributes);
    }
    for (at, descriptor) in lower.descriptors().chain(upper.descriptors()) {
        ram.write(at, &descriptor.to_le_bytes()).unwrap();
    }
    let tracker = Stage2::map(&vm, &ram)
        .unwrap()
        .track(Policy::Pages)
        .unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    start(&vcpu);
    vcpu.set_system_register(SysReg::TCR_EL1, lower.control() | 0b11 << 39)
        .unwrap();
    for (register, root) in [(SysReg::TTBR0_EL1, LOWER), (SysReg::TTBR1_EL1, UPPER)] {
        vcpu.set_system_register(register, root).unwrap();
    }
    vcpu.set_register(Register::PC, CODE_AT).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
    (vm, tracker, vcpu, upper)
}

/// Returns the offsets of the pages that are marked, and begins the next epoch.
fn written(tracker: &Stage2Tracker<Stage2>) -> Vec<u64> {
    let epoch = tracker.checkpoint().unwrap();
    let runs = epoch.bitmap().runs();
    let pages = runs
        .flat_map(|run| run.step_by(PAGE_SIZE as usize))
        .collect();
    epoch.release().unwrap();
    pages
}

#[test]
fn stores_by_virtual_addresses_mark_physical_pages() {
    let _turn = control::turn();
    let (vm, tracker, mut vcpu, _) = machine(8, ACCESSED);
    for page in [0, 5, 7] {
        let address = DATA_AT + page * PAGE_SIZE + 0x18;
        vcpu.set_register(Register::X0, 0x4200 + page).unwrap();
        vcpu.set_register(Register::X1, address).unwrap();
        let physical = DATA + (7 - page) * PAGE_SIZE + 0x18;
        // The exit that the tracker handles next: the store is repeated.
        let Exit::Exception(fault) = vcpu.run().unwrap() else {
            panic!("no exception");
        };
        assert_eq!(fault.virtual_address, address);
        assert_eq!(fault.physical_address, physical);
        let exit = run_tracked(&tracker, &mut vcpu);
        assert!(matches!(exit, Exit::Exception(it) if it.syndrome >> 26 == 0x16));
        let mut word = [0; 8];
        let ram = tracker.protection().ram();
        ram.read(physical, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 0x4200 + page);
        assert_eq!(written(&tracker), [(DATA - RAM) + (7 - page) * PAGE_SIZE]);
    }
    drop((vcpu, vm));
}

#[test]
fn a_dirty_state_that_the_processor_sets_marks_its_table() {
    let _turn = control::turn();
    control::set_identification(ID_AA64MMFR1_EL1, 0x1121_2002);
    let (vm, tracker, mut vcpu, mut upper) = machine(1, ACCESSED | READ_ONLY | DIRTY_MODIFIER);
    vcpu.set_register(Register::X1, DATA_AT).unwrap();
    run_tracked(&tracker, &mut vcpu);
    let table = (upper.entry(DATA_AT) - RAM) & !(PAGE_SIZE - 1);
    assert_eq!(written(&tracker), [table, DATA - RAM]);
    drop((vcpu, vm));
}
