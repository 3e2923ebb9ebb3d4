//! A KVM guest on RAM that is filled on demand.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::io;
use std::sync::Arc;

use guest_ram::RamOwner;
use kvm_backend::{GuestRam, RamSlots, long_mode, open_kvm};
use kvm_ioctls::VcpuExit;
use lazy_restore::{LazyRam, LazyRamOptions};
use memory_image::MappedChain;
use page_reader::RamLayout;
use rstest::rstest;
use support::open_chain;
use test_images::{Images, whole};
use test_machine::needs;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const PAGE: u64 = 4096;

/// Guest-physical layout. RAM below the summed words is zeros: the processor reads its task state
/// from the lowest bytes.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x10000;
const STACK: u64 = 0x12000;
const FROM: u64 = MIB;

/// Adds up rcx words from rsi on, and stores the sum in place of the last.
const SUM: [u8; 20] = [
    0x31, 0xc0, // xor eax, eax
    0x48, 0x03, 0x06, // add rax, [rsi]
    0x48, 0x83, 0xc6, 0x08, // add rsi, 8
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf4, // jnz to the add
    0x48, 0x89, 0x46, 0xf8, // mov [rsi - 8], rax
    0xe6, 0x80, // out 0x80, al
];

fn images() -> Images {
    Images::new(SIZE, PAGE)
        .with([256..3000, 4000..8192])
        .with((13..400).map(|i| 20 * i..20 * i + 1))
        .with([900..1100, 3500..3600])
}

/// Runs a guest whose RAM is in the memory of `owner`. Returns its sum.
fn sum(owner: impl RamOwner) -> u64 {
    let kvm = open_kvm().unwrap();
    let vm = kvm_backend::create_vm(&kvm).unwrap();
    let layout = RamLayout::single(0, SIZE).unwrap();
    let ram = Arc::new(GuestRam::from_owner(layout, owner).unwrap());
    let _slots = RamSlots::register(&vm, &ram, 0).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    ram.write(CODE, &SUM).unwrap();
    let start = long_mode::Start {
        entry: CODE,
        stack: STACK,
        page_tables: TABLES,
    };
    long_mode::boot(&kvm, &ram, &vcpu, &start).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rsi, regs.rcx) = (FROM, (SIZE - FROM) / 8);
    vcpu.set_regs(&regs).unwrap();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, _)) => break,
            // While the vCPU waits for a page, the kernel may wake it for other work.
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
            other => panic!("{other:?}"),
        }
    }
    vcpu.get_regs().unwrap().rax
}

fn expected(images: &Images) -> u64 {
    let words = images.ram[FROM as usize..].as_chunks::<8>().0;
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    words.fold(0, u64::wrapping_add)
}

#[rstest]
#[case::ahead(LazyRam::options())]
#[case::on_demand(LazyRam::options().prefetch(false))]
fn vcpu_reads_the_images_bytes_in_missing_pages(#[case] options: LazyRamOptions) {
    needs!(Userfaultfd, Kvm);
    let mut images = images();
    let ram = Arc::new(options.start(open_chain(&images)).unwrap());
    let sum = sum(Arc::clone(&ram));
    assert_eq!(sum, expected(&images));
    ram.wait().unwrap();
    // The guest's writes are not overwritten.
    images.ram[SIZE as usize - 8..].copy_from_slice(&sum.to_le_bytes());
    assert!(whole(&ram, SIZE as usize)[FROM as usize..] == images.ram[FROM as usize..]);
}

/// Like a balloon device: discards pages that were filled, and pages that were not.
#[test]
fn vcpu_reads_zeros_in_discarded_pages() {
    needs!(Userfaultfd, Kvm);
    let mut images = images();
    let ram = LazyRam::options().prefetch(false);
    let ram = Arc::new(ram.start(open_chain(&images)).unwrap());
    page_reader::PageReader::read_at(&ram, 5000 * PAGE, &mut [0]).unwrap();
    for (page, pages) in [(2000, 100), (4990, 20), (8000, 1)] {
        let (start, len) = ((page * PAGE) as usize, (pages * PAGE) as usize);
        let address = ram.as_ptr().wrapping_add(start);
        support::regions::advise(address, len as u64, nix::libc::MADV_DONTNEED).unwrap();
        images.ram[start..start + len].fill(0);
    }
    assert_eq!(sum(Arc::clone(&ram)), expected(&images));
    ram.wait().unwrap();
}

#[test]
fn vcpu_reads_the_images_bytes_in_a_mapped_chain() {
    needs!(Kvm);
    let images = images();
    let before = std::fs::read(images.path(0)).unwrap();
    let ram = MappedChain::options()
        .max_mappings(100)
        .map(&open_chain(&images))
        .unwrap();
    assert_eq!(sum(ram), expected(&images));
    assert!(std::fs::read(images.path(0)).unwrap() == before);
}
