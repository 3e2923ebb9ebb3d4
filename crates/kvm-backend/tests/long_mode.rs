//! The long-mode state in which guests of one program start.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::sync::Arc;

use kvm_backend::long_mode::{self, BootError, Start, page_table_bytes};
use kvm_backend::{GuestRam, RamSlots, Vcpus, open_kvm};
use kvm_ioctls::VcpuExit;
use page_reader::RamLayout;
use rstest::rstest;
use support::{CODE, Guest, HIGH, HIGH_SIZE, LOW_SIZE, Program, STACK, TABLES};
use test_machine::needs;

const GIB: u64 = 1 << 30;

#[rstest]
#[case::one_mib_in_small_pages(&[(0, 1 << 20)], 4)]
#[case::two_mib_in_a_large_page(&[(0, 2 << 20)], 3)]
#[case::four_gib_and_a_gap(&[(0, 3 * GIB), (4 * GIB, GIB)], 2 + 4)]
#[case::ragged_at_both_ends(&[(0x1ff000, 0x202000 + (2 << 20))], 3 + 2)]
#[case::past_512_gib(&[(0, GIB), (1 << 39, GIB)], 1 + 2 * 2)]
fn page_tables_use_large_pages_where_possible(#[case] regions: &[(u64, u64)], #[case] pages: u64) {
    let layout = RamLayout::new(regions.iter().copied()).unwrap();
    assert_eq!(page_table_bytes(&layout).unwrap(), pages * 4096);
}

#[test]
fn ram_above_the_lower_half_is_refused() {
    let layout = RamLayout::new([(0, GIB), (1 << 47, GIB)]).unwrap();
    let error = page_table_bytes(&layout).unwrap_err();
    assert!(matches!(error, BootError::AddressTooHigh { end } if end == (1 << 47) + GIB));
}

/// Uses 4 GiB with an MMIO gap, and an unaligned region. The guest writes at every border.
#[test]
fn program_reaches_all_of_its_ram_and_nothing_else() {
    needs!(Kvm);
    let regions = [(0, 3 * GIB), (4 * GIB, GIB), (6 * GIB + 0x5000, 0x403000)];
    let mut guest = Guest::with_ram(regions, |_| ());
    guest.boot(Program::Touch);
    let borders: Vec<u64> = regions
        .iter()
        .flat_map(|(start, size)| [(*start).max(0x20000), start + size - 8])
        .chain([6 * GIB + 0x200000 - 8, 6 * GIB + 0x200000])
        .collect();
    guest.touch(&borders);
    for border in &borders {
        let mut word = [0; 8];
        guest.ram.read(*border, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 1, "{border:#x}");
    }
    for outside in [3 * GIB, 4 * GIB - 8, 6 * GIB + 0x4ff8, 6 * GIB + 0x408000] {
        let mut guest = Guest::with_ram(regions, |_| ());
        guest.boot(Program::Touch);
        let list = 0x12000;
        guest.ram.write(list, &outside.to_le_bytes()).unwrap();
        guest.set_regs(|regs| (regs.rsi, regs.rcx) = (list, 1));
        let exit = guest.vcpu.run().unwrap();
        assert!(matches!(exit, VcpuExit::Shutdown), "{outside:#x}: {exit:?}");
    }
}

#[test]
fn several_vcpus_share_the_page_tables() {
    needs!(Kvm);
    let guest = Guest::booted(Program::TwoOuts);
    let second = guest.vcpus.create(&guest.vm, 1).unwrap();
    let start = Start {
        entry: CODE,
        stack: STACK - 0x800,
        page_tables: TABLES,
    };
    long_mode::boot(&guest.kvm, &guest.ram, &second, &start).unwrap();
    for mut vcpu in [guest.vcpu, second] {
        support::run(&mut vcpu);
    }
}

#[rstest]
#[case::entry_in_the_gap(
    Start { entry: LOW_SIZE, ..GOOD },
    "the first instruction is at 0x400000, where there is no RAM"
)]
#[case::no_stack(
    Start { stack: 0, ..GOOD },
    "the top of the stack is at 0xffffffffffffffff, where there is no RAM"
)]
#[case::stack_in_the_tables(Start { stack: TABLES + 0x1000, ..GOOD }, "among the page tables")]
#[case::odd_tables(Start { page_tables: TABLES + 8, ..GOOD }, "give a multiple of 4096")]
#[case::tables_past_the_end(
    Start { page_tables: HIGH + HIGH_SIZE - 0x1000, ..GOOD },
    "give them `page_table_bytes` of RAM"
)]
#[case::tables_at_the_last_address(
    Start { page_tables: u64::MAX - 0xfff, ..GOOD },
    "give them `page_table_bytes` of RAM"
)]
fn bad_start_is_refused_before_any_write(#[case] start: Start, #[case] says: &str) {
    needs!(Kvm);
    let guest = Guest::new();
    let error = long_mode::boot(&guest.kvm, &guest.ram, &guest.vcpu, &start).unwrap_err();
    assert!(error.to_string().contains(says), "{error}");
    assert!(guest.ram.dirty_bitmap().is_clean());
}

const GOOD: Start = Start {
    entry: CODE,
    stack: STACK,
    page_tables: TABLES,
};

#[test]
fn stack_may_end_at_the_end_of_the_ram() {
    needs!(Kvm);
    let kvm = open_kvm().unwrap();
    let vm = Arc::new(kvm_backend::create_vm(&kvm).unwrap());
    let ram = Arc::new(GuestRam::new(RamLayout::single(0, 1 << 20).unwrap()).unwrap());
    let _slots = RamSlots::register(&vm, &ram, 0).unwrap();
    let mut vcpu = Vcpus::new(&vm).unwrap().create(&vm, 0).unwrap();
    ram.write(CODE, &[0x6a, 42, 0x58, 0xe6, 0x80]).unwrap(); // push 42; pop rax; out 0x80, al
    let start = Start {
        stack: 1 << 20,
        ..GOOD
    };
    long_mode::boot(&kvm, &ram, &vcpu, &start).unwrap();
    assert_eq!(support::run(&mut vcpu), 42);
}
