//! What only a framework that can be examined shows: interrupts, timers, and several vCPUs.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Barrier};
use std::thread;

use dirty_bitmap::{Policy, TakenBitmap};
use fake_hvf::control;
use hvf_backend::{
    Encoding, Exit, GuestRam, MapError, PAGE_SIZE, Register, RestoreError, Stage2, Stage2Tracker,
    SysReg, SystemRegister, VcpuState, Vm,
};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;
use support::{PROGRAM, RAM, run_tracked, start};

const SIZE: u64 = 8 << 20;
const VECTORS: u64 = PROGRAM + 0x800;
const DATA: u64 = RAM + (4 << 20);

fn hvc(number: u32) -> u32 {
    0xd400_0002 | number << 5
}

/// Creates a machine with the program in its RAM.
fn machine(code: &[u32]) -> (Vm, Stage2) {
    let vm = Vm::new().unwrap();
    let ram = Arc::new(GuestRam::new(RamLayout::single(RAM, SIZE).unwrap()).unwrap());
    support::write_guest(&ram, code);
    let stage2 = Stage2::map(&vm, &ram).unwrap();
    (vm, stage2)
}

/// Returns the operand of the hypercall.
fn hypercall(exit: Exit) -> u16 {
    match exit {
        Exit::Exception(exception) if exception.syndrome >> 26 == 0x16 => exception.syndrome as u16,
        other => panic!("{other:x?}"),
    }
}

/// The handlers of interrupts make hypercalls with the offsets of their vectors.
#[rstest]
#[case::irq(true, false, 0x280)]
#[case::fiq(false, true, 0x300)]
fn a_pending_interrupt_is_of_the_captured_kind(
    #[case] irq: bool,
    #[case] fiq: bool,
    #[case] vector: u16,
) {
    let _turn = control::turn();
    let (vm, stage2) = machine(&[0xd503_43ff, 0x1400_0000]); // msr daifclr, #3; b .
    for handler in [0x280, 0x300] {
        let code = hvc(handler).to_le_bytes();
        let at = VECTORS + u64::from(handler);
        stage2.ram().write(at, &code).unwrap();
    }
    let mut vcpu = vm.create_vcpu().unwrap();
    start(&vcpu);
    vcpu.set_system_register(SysReg::VBAR_EL1, VECTORS).unwrap();
    let mut state = VcpuState::capture(&vcpu).unwrap();
    (state.pending_irq, state.pending_fiq) = (irq, fiq);
    let _ = state.restore(&vcpu, 0).unwrap();
    let again = VcpuState::capture(&vcpu).unwrap();
    assert_eq!((again.pending_irq, again.pending_fiq), (irq, fiq));
    assert_eq!(hypercall(vcpu.run().unwrap()), vector);
    // The exit has cleared it.
    let after = VcpuState::capture(&vcpu).unwrap();
    assert_eq!((after.pending_irq, after.pending_fiq), (false, false));
}

#[test]
fn an_exit_of_a_later_system_is_reported_by_its_number() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    control::exit_with(7);
    assert_eq!(vcpu.run().unwrap(), Exit::Unknown(7));
    drop((vcpu, vm));
}

#[test]
fn a_timer_that_fires_exits_and_is_masked() {
    let _turn = control::turn();
    let (vm, _stage2) = machine(&[0x1400_0000]); // b .
    let mut vcpu = vm.create_vcpu().unwrap();
    start(&vcpu);
    vcpu.set_system_register(SysReg::CNTV_CVAL_EL0, 1).unwrap();
    vcpu.set_system_register(SysReg::CNTV_CTL_EL0, 1).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::VtimerActivated);
    let state = VcpuState::capture(&vcpu).unwrap();
    assert!(state.vtimer.masked);
    drop(vcpu);

    let mut vcpu = vm.create_vcpu().unwrap();
    let _ = state.restore(&vcpu, 0).unwrap();
    vcpu.canceller().cancel().unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Canceled);
    assert!(VcpuState::capture(&vcpu).unwrap().vtimer.masked);
}

#[test]
fn a_guest_sees_no_time_pass_while_it_is_saved() {
    let _turn = control::turn();
    let (vm, _stage2) = machine(&[0xd53b_e040, hvc(0)]); // mrs x0, cntvct_el0
    let mut vcpu = vm.create_vcpu().unwrap();
    start(&vcpu);
    let mut state = VcpuState::capture(&vcpu).unwrap();
    // The guest's clock is far from the host's.
    state.vtimer.counter = 1 << 60;
    let offset = state.vtimer.resuming_offset();
    let _ = state.restore(&vcpu, offset).unwrap();
    assert_eq!(hypercall(vcpu.run().unwrap()), 0);
    let counter = vcpu.register(Register::X0).unwrap();
    assert!(counter >= 1 << 60, "{counter:#x}");
    let state = VcpuState::capture(&vcpu).unwrap();
    assert!(state.vtimer.counter >= counter);
}

#[test]
fn code_that_the_host_replaced_is_executed() {
    let _turn = control::turn();
    let (vm, stage2) = machine(&[0xd280_0020, hvc(0), 0x17ff_fffe]); // mov x0, #1; hvc #0; b .-8
    let mut vcpu = vm.create_vcpu().unwrap();
    start(&vcpu);
    let mut run = || {
        hypercall(vcpu.run().unwrap());
        vcpu.register(Register::X0).unwrap()
    };
    assert_eq!((run(), run()), (1, 1));
    let replaced = 0xd280_0040_u32; // mov x0, #2
    let code = replaced.to_le_bytes();
    stage2.ram().write(PROGRAM, &code).unwrap();
    let program = PROGRAM - RAM..PROGRAM - RAM + 8;
    stage2.invalidate_instructions(program).unwrap();
    assert_eq!(run(), 2);
    let error = stage2
        .invalidate_instructions(SIZE - 4..SIZE + 4)
        .unwrap_err();
    assert!(error.to_string().contains("RAM"), "{error}");
}

const REGIONS: [(u64, u64); 2] = [(RAM, SIZE), (RAM + 2 * SIZE, SIZE)];

#[test]
fn ram_that_children_would_inherit_is_an_error() {
    let _turn = control::turn();
    control::fail("minherit", 2, fake_hvf::Code::FAULT);
    let vm = Vm::new().unwrap();
    let ram = Arc::new(GuestRam::new(RamLayout::new(REGIONS).unwrap()).unwrap());
    let error = Stage2::map(&vm, &ram).unwrap_err();
    assert!(matches!(error, MapError::Inherit(_)), "{error:?}");
    assert_eq!(control::mapped(), []);
}

/// `dc` (do not copy) in the flags of `smaps`: the memory is not in the copy of a forked process.
#[test]
fn forked_processes_do_not_inherit_the_ram() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let ram = Arc::new(GuestRam::new(RamLayout::new(REGIONS).unwrap()).unwrap());
    let _stage2 = Stage2::map(&vm, &ram).unwrap();
    let mut kept = BTreeSet::new();
    // The kernel joins neighbors.
    let mut area = 0..0;
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let first = line.split_once(' ').map_or(line, |(first, _)| first);
        if let Some((start, end)) = first.split_once('-') {
            let parse = |address| usize::from_str_radix(address, 16).unwrap();
            area = parse(start)..parse(end);
        } else if first == "VmFlags:" && line.split(' ').any(|flag| flag == "dc") {
            let mapped = control::mapped().into_iter();
            let inside = mapped.filter(|mapped| area.contains(&mapped.host_start));
            kept.extend(inside.map(|mapped| mapped.guest_start));
        }
    }
    assert_eq!(kept, REGIONS.map(|(start, _)| start).into());
}

const VCPUS: u64 = 4;
const PAGES: u64 = 64;
const PASSES: u64 = 8;

/// Stores x0 to each of x3 pages, each VCPUS pages after the last, in x4 passes.
const FILL: [u32; 11] = [
    0xaa01_03e5, // pass: mov x5, x1
    0xaa03_03e6, //       mov x6, x3
    0x9100_0400, //       add x0, x0, #1
    0xf900_00a0, // page: str x0, [x5]
    0x8b02_00a5, //       add x5, x5, x2
    0xf100_04c6, //       subs x6, x6, #1
    0x54ff_ffa1, //       b.ne page
    0xf100_0484, //       subs x4, x4, #1
    0x54ff_ff01, //       b.ne pass
    0xd400_0002, //       hvc #0
    0x1400_0000, //       b .
];

/// Fills the pages of vCPU `number`, from the thread of the vCPU.
fn fill(vm: &Vm, tracker: &Stage2Tracker<Stage2>, number: u64) {
    let mut vcpu = vm.create_vcpu().unwrap();
    start(&vcpu);
    let first = DATA + number * PAGE_SIZE;
    let arguments = [number << 32, first, VCPUS * PAGE_SIZE, PAGES, PASSES];
    let registers = [
        Register::X0,
        Register::X1,
        Register::X2,
        Register::X3,
        Register::X4,
    ];
    for (register, value) in registers.into_iter().zip(arguments) {
        vcpu.set_register(register, value).unwrap();
    }
    let exit = run_tracked(tracker, &mut vcpu);
    assert_eq!(hypercall(exit), 0);
}

/// Four vCPUs write pages next to each other's while checkpoints are taken and their pages copied.
#[rstest]
fn no_write_of_four_vcpus_is_lost(#[values(Policy::Pages, Policy::default())] policy: Policy) {
    let _turn = control::turn();
    let (vm, stage2) = machine(&FILL);
    let ram = Arc::clone(stage2.ram());
    let exact = matches!(policy, Policy::Pages);
    let tracker = stage2.track(policy).unwrap();
    let mut image = vec![0; SIZE as usize];
    let mut marked = BTreeSet::new();
    let mut copy = |bitmap: &TakenBitmap, marked: &mut BTreeSet<u64>| {
        for offset in (0..SIZE).step_by(PAGE_SIZE as usize) {
            if bitmap.is_dirty(offset).unwrap() {
                let page = &mut image[offset as usize..][..PAGE_SIZE as usize];
                ram.read_at(offset, page).unwrap();
                marked.insert(offset);
            }
        }
    };
    let epoch = tracker.checkpoint().unwrap();
    copy(epoch.bitmap(), &mut BTreeSet::new());
    epoch.release().unwrap();
    let together = Barrier::new(VCPUS as usize + 1);
    thread::scope(|scope| {
        for number in 0..VCPUS {
            let (vm, tracker, together) = (&vm, &tracker, &together);
            scope.spawn(move || {
                together.wait();
                fill(vm, tracker, number);
            });
        }
        together.wait();
        for _ in 0..20 {
            let epoch = tracker.checkpoint_live().unwrap();
            copy(epoch.bitmap(), &mut marked);
            epoch.release().unwrap();
        }
    });
    let epoch = tracker.checkpoint().unwrap();
    copy(epoch.bitmap(), &mut marked);
    epoch.release().unwrap();

    let written = (0..VCPUS * PAGES).map(|page| DATA - RAM + page * PAGE_SIZE);
    let written: BTreeSet<u64> = written.collect();
    assert!(marked.is_superset(&written));
    assert!(!exact || marked == written);
    let mut now = vec![0; SIZE as usize];
    ram.read_at(0, &mut now).unwrap();
    let stale = |offset: &u64| {
        let page = *offset as usize..(offset + PAGE_SIZE) as usize;
        image[page.clone()] != now[page]
    };
    let stale: Vec<u64> = (0..SIZE)
        .step_by(PAGE_SIZE as usize)
        .filter(stale)
        .collect();
    assert!(stale.is_empty(), "{stale:x?}");
}

#[test]
fn a_register_of_another_build_is_an_error() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let mut state = VcpuState::capture(&vcpu).unwrap();
    state.system.push(SystemRegister {
        register: Encoding(0xffff),
        value: 0,
    });
    let error = state.restore(&vcpu, 0).unwrap_err();
    let unknown = matches!(error, RestoreError::UnknownRegister(Encoding(0xffff)));
    assert!(unknown, "{error:?}");
}

#[test]
fn a_state_with_interrupt_controller_needs_one() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let mut state = VcpuState::capture(&vcpu).unwrap();
    state.gic_cpu = vec![SystemRegister {
        register: Encoding(0xc230),
        value: 0xff,
    }];
    let error = state.restore(&vcpu, 0).unwrap_err();
    let gic = matches!(error, RestoreError::Gic { captured: true });
    assert!(gic, "{error:?}");
}

#[test]
fn a_register_that_is_ignored_is_reported() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let mut state = VcpuState::capture(&vcpu).unwrap();
    // Bit 31 of MPIDR_EL1 is always 1.
    let affinity = state
        .system
        .iter_mut()
        .find(|saved| saved.register == Encoding(SysReg::MPIDR_EL1 as u16))
        .unwrap();
    affinity.value = 1;
    let affinity = *affinity;
    let restored = state.restore(&vcpu, 0).unwrap();
    assert_eq!(restored.differing, [affinity]);
}

#[cfg(feature = "macos-26")]
#[test]
fn small_pages_are_tracked_one_by_one() {
    let _turn = control::turn();
    let vm = Vm::options().small_pages(true).create().unwrap();
    assert_eq!(vm.granule(), 4096);
    let bitmap = dirty_bitmap::TrackedBitmap::tracked(0, SIZE, 4096).unwrap();
    let layout = RamLayout::single(RAM, SIZE).unwrap();
    let options = GuestRam::options().dirty_bitmap(Arc::new(bitmap));
    let ram = Arc::new(options.allocate(layout).unwrap());
    support::write_guest(&ram, &[0xf900_0020, hvc(0)]); // str x0, [x1]
    let stage2 = Stage2::map(&vm, &ram).unwrap();
    assert_eq!(stage2.vm().granule(), 4096);
    let tracker = stage2.track(Policy::Pages).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    start(&vcpu);
    vcpu.set_register(Register::X1, DATA + 4096).unwrap();
    run_tracked(&tracker, &mut vcpu);
    let epoch = tracker.checkpoint().unwrap();
    let runs: Vec<_> = epoch.bitmap().runs().collect();
    assert_eq!(runs, [DATA - RAM + 4096..DATA - RAM + 8192]);
    drop((vcpu, vm));
}
