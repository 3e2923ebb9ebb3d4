//! Guest RAM: its mappings, access from the host, memory slots.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::error::Error;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use dirty_bitmap::LoggedBitmap;
use guest_ram::GuestRamError;
use kvm_backend::{GuestRam, OpenKvmError, RamSlots, SlotError, open_kvm, open_kvm_at};
use kvm_ioctls::VcpuExit;
use nix::sys::mman::{MmapAdvise, madvise};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;
use support::{DONE, Guest, HIGH, HIGH_SIZE, INPUT, LOW_SIZE, PAGE, Program};
use test_machine::{Need, ReadOnlyBind, needs};

fn layout() -> RamLayout {
    RamLayout::new([(0, LOW_SIZE), (HIGH, HIGH_SIZE)]).unwrap()
}

/// Returns the line of `/proc/self/maps` whose range contains `address`, from its permissions on.
fn mapping_of(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut lines = maps.lines();
    let line = lines.find(|line| {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |digits| usize::from_str_radix(digits, 16).unwrap();
        (number(start)..number(end)).contains(&address)
    });
    line.unwrap().split_once(' ').unwrap().1.to_owned()
}

/// Returns the device and inode mapped at `address`, which anonymous shared memory has too. Other
/// tests may map memory where this one unmapped some, so the address alone does not identify a
/// mapping.
fn file_at(address: usize) -> String {
    let mapping = mapping_of(address);
    let [_permissions, _offset, device, inode, ..] =
        mapping.split_ascii_whitespace().collect::<Vec<_>>()[..]
    else {
        panic!("{mapping}");
    };
    assert_ne!(inode, "0", "{mapping}");
    format!(" {device} {inode} ")
}

/// Returns whether this process has any of the file mapped, anywhere.
fn is_mapped(file: &str) -> bool {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .any(|line| line.contains(file))
}

#[test]
fn new_ram_is_zeroed_guarded_and_congruent() {
    let layout = RamLayout::new([(0x5000, 3 * PAGE), (HIGH, HIGH_SIZE)]).unwrap();
    let ram = GuestRam::new(layout.clone()).unwrap();
    for region in layout.regions() {
        let memory = ram.host_memory(region.offset, usize::MAX).unwrap();
        assert_eq!(memory.len() as u64, region.size);
        let start = memory.as_ptr().addr();
        assert_eq!(start as u64 % (2 << 20), region.guest_start % (2 << 20));
        assert!(mapping_of(start).starts_with("rw-s"));
        assert!(mapping_of(start - 1).starts_with("---p"));
        assert!(mapping_of(start + memory.len()).starts_with("---p"));
    }
    let mut all = vec![1; layout.ram_size() as usize];
    ram.read_at(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));

    let file = file_at(ram.host_memory(0, 1).unwrap().as_ptr().addr());
    assert!(is_mapped(&file));
    drop(ram);
    assert!(!is_mapped(&file));
}

#[test]
fn memfd_has_the_ram_at_its_offsets_and_a_sealed_size() {
    let ram = GuestRam::options()
        .memfd("guest")
        .allocate(layout())
        .unwrap();
    ram.write(HIGH, b"high").unwrap();
    let file = std::fs::File::from(ram.memfd().unwrap().try_clone_to_owned().unwrap());
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, LOW_SIZE).unwrap();
    assert_eq!(&bytes, b"high");
    assert_eq!(file.metadata().unwrap().len(), LOW_SIZE + HIGH_SIZE);
    // Shrinking the file would remove memory of the guest.
    assert!(file.set_len(LOW_SIZE).is_err());
    let address = ram.host_memory(0, 1).unwrap().as_ptr().addr();
    assert!(mapping_of(address).contains("/memfd:guest"));
    assert!(GuestRam::new(layout()).unwrap().memfd().is_none());
}

#[test]
fn huge_pages_are_advised() {
    let ram = GuestRam::options()
        .huge_pages(true)
        .allocate(layout())
        .unwrap();
    let start = ram.host_memory(0, 1).unwrap().as_ptr().addr();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mapping = smaps.split_once(&format!("\n{start:x}-")).unwrap().1;
    let flags = mapping
        .lines()
        .find(|line| line.starts_with("VmFlags"))
        .unwrap();
    assert!(flags.contains(" hg"), "{flags}");
}

#[test]
fn given_bitmap_is_marked() {
    let layout = RamLayout::single(1 << 30, 1 << 20).unwrap();
    let dirty = Arc::new(LoggedBitmap::logged(1 << 30, 1 << 20, 16384).unwrap());
    let options = GuestRam::options().dirty_bitmap(Arc::clone(&dirty));
    let ram = options.allocate(layout).unwrap();
    ram.write((1 << 30) + 0x8000, &[1]).unwrap();
    assert!(dirty.runs().eq([0x8000..0xc000]));

    let refused = options.memfd("guest").allocate(self::layout());
    assert!(matches!(refused, Err(GuestRamError::BitmapMismatch(_))));
}

#[test]
fn memory_of_the_caller_is_adopted_and_not_unmapped() {
    let owner = GuestRam::new(layout()).unwrap();
    let addresses = [owner.host_address(0), owner.host_address(1)];
    // SAFETY: both regions' mappings, which `owner` keeps until the end of the test, and which are
    // accessed by atomic operations only.
    #[allow(unsafe_code)]
    let adopted = unsafe { GuestRam::options().adopt(layout(), &addresses) }.unwrap();
    adopted.write(HIGH, b"seen by both").unwrap();
    assert!(adopted.dirty_bitmap().is_dirty(LOW_SIZE).unwrap());
    drop(adopted);
    let mut bytes = [0; 12];
    owner.read(HIGH, &mut bytes).unwrap();
    assert_eq!(&bytes, b"seen by both");
}

/// The documentation of the crate states how a balloon discards pages.
#[test]
fn only_madv_remove_discards_pages_of_shared_ram() {
    let ram = GuestRam::new(layout()).unwrap();
    ram.write(HIGH, &[7]).unwrap();
    let discard = |advice| {
        let start = ram.host_address(1).cast();
        // SAFETY: the first page of the mapping, which `ram` keeps. The data are only zeroed.
        #[allow(unsafe_code)]
        unsafe { madvise(start, PAGE as usize, advice) }.unwrap();
        let mut byte = [0];
        ram.read(HIGH, &mut byte).unwrap();
        byte[0]
    };
    assert_eq!(discard(MmapAdvise::MADV_DONTNEED), 7);
    assert_eq!(discard(MmapAdvise::MADV_REMOVE), 0);
}

#[test]
fn ram_larger_than_the_address_space_is_an_allocation_error() {
    let layout = RamLayout::single(0, 1 << 50).unwrap();
    let dirty = Arc::new(LoggedBitmap::logged(0, 1 << 50, 1 << 40).unwrap());
    let options = GuestRam::options().dirty_bitmap(dirty);
    let error = options.allocate(layout).unwrap_err();
    assert!(matches!(
        error,
        GuestRamError::Allocate { call: "mmap", .. }
    ));
    assert!(error.source().is_some() && error.to_string().contains("ulimit -v"));
}

#[test]
fn failed_registration_removes_the_slots_of_the_call() {
    needs!(Kvm);
    let guest = Guest::new();
    // The first region is free, the second overlaps one of the guest's.
    let layout = RamLayout::new([(1 << 33, 1 << 20), (HIGH + PAGE, 1 << 20)]).unwrap();
    let ram = Arc::new(GuestRam::new(layout).unwrap());
    let error = RamSlots::register(&guest.vm, &ram, 2).unwrap_err();
    assert!(
        matches!(error, SlotError::Overlap { slot: 2, guest_start, .. } if guest_start == HIGH + PAGE)
    );
    assert!(error.to_string().contains("overlaps another slot"));
    assert_eq!(Arc::strong_count(&ram), 1);

    let layout = RamLayout::new([(1 << 32 | 1 << 30, 1 << 20), (1 << 33, 1 << 20)]).unwrap();
    let ram = Arc::new(GuestRam::new(layout).unwrap());
    let slots = RamSlots::register(&guest.vm, &ram, 2).unwrap();
    let again = RamSlots::register(
        &guest.vm,
        &Arc::new(GuestRam::new(RamLayout::single(1 << 34, 1 << 20).unwrap()).unwrap()),
        2,
    );
    assert!(matches!(again, Err(SlotError::InUse { slot: 2 })));
    drop(slots);
    assert_eq!(Arc::strong_count(&ram), 1);
    // If the slots were still registered, other memory could not take their place.
    let other = Arc::new(GuestRam::new(ram.layout().clone()).unwrap());
    let _ = RamSlots::register(&guest.vm, &other, 2).unwrap();
}

#[test]
fn slot_number_above_the_limit_of_kvm_is_refused() {
    needs!(Kvm);
    let guest = Guest::new();
    for first in [u32::MAX, guest.kvm.get_nr_memslots() as u32 - 1] {
        let error = RamSlots::register(&guest.vm, &guest.ram, first).unwrap_err();
        assert!(matches!(error, SlotError::SlotNumber { .. }), "{error}");
    }
}

#[test]
fn guest_without_its_slots_finds_no_memory() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    guest.touch(&[HIGH]);
    let Guest {
        mut vcpu,
        slots,
        ram,
        vm,
        ..
    } = guest;
    let file = file_at(ram.host_memory(0, 1).unwrap().as_ptr().addr());
    drop((slots, vm));
    assert_eq!(Arc::strong_count(&ram), 1); // the vCPU keeps the VM, but not the RAM
    drop(ram);
    assert!(!is_mapped(&file));
    // There is no instruction to fetch any more.
    let exit = vcpu.run();
    assert!(!matches!(exit, Ok(VcpuExit::IoOut(DONE, _))), "{exit:?}");
}

#[test]
fn adopted_slots_are_logged_and_stay_registered() {
    needs!(Kvm);
    let mut guest = Guest::touching_adopted(&[3, 7]);
    let log = guest.log(kvm_backend::Reprotect::WhenRead);
    guest.touch(&[HIGH]);
    log.harvest_live().unwrap();
    assert!(guest.ram.dirty_bitmap().is_dirty(LOW_SIZE).unwrap());
    let Guest {
        slots,
        ram,
        mut vcpu,
        ..
    } = guest;
    drop((log, slots));
    // The memory is still there.
    let regs = vcpu.get_regs().unwrap();
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rip: support::CODE,
        rcx: 0,
        ..regs
    })
    .unwrap();
    support::run(&mut vcpu);
    drop((vcpu, ram));
}

#[rstest]
#[case::missing("/nonexistent/kvm", "load the kvm_intel or kvm_amd module")]
#[case::another_device("/dev/null", "version -1 of the KVM interface, not 12")]
fn error_without_kvm_says_what_to_do(#[case] device: &str, #[case] says: &str) {
    let error = open_kvm_at(Path::new(device)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(device) && text.contains(says), "{text}");
}

#[test]
fn device_without_permission_is_reported_as_not_permitted() {
    needs!(Root);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("kvm"), "").unwrap();
    let read_only = ReadOnlyBind::of(dir.path()).unwrap();
    let error = open_kvm_at(&read_only.path().join("kvm")).unwrap_err();
    assert!(
        matches!(error, OpenKvmError::NotPermitted { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("group") && error.source().is_some());
}

#[test]
fn kvm_opens() {
    if Need::Kvm.met("kvm_opens") {
        open_kvm().unwrap();
    }
}

#[test]
fn running_guest_sees_a_host_write() {
    needs!(Kvm);
    let mut guest = Guest::booted(Program::Scatter);
    guest.set_regs(|regs| {
        regs.rdi = LOW_SIZE;
        regs.r10 = 16;
        regs.rdx = INPUT;
    });
    let (vcpu, ram) = (&mut guest.vcpu, &guest.ram);
    std::thread::scope(|threads| {
        let running = threads.spawn(move || support::run(vcpu));
        ram.write(INPUT, &1u64.to_le_bytes()).unwrap();
        running.join().unwrap();
    });
}
