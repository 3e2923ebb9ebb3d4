//! Memory slots: their numbers, and that each has one owner.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::os::fd::AsRawFd;
use std::os::fd::IntoRawFd;
use std::sync::Arc;

use kvm_backend::{DirtyLog, GuestRam, RamSlots, Reprotect, SlotError, Vcpus, create_vm};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use page_reader::RamLayout;
use rstest::rstest;
use support::{Guest, HIGH, HIGH_SIZE, LOW_SIZE, PAGE, adopted};
use test_machine::needs;

/// Returns the RAM again: another value for the same memory.
fn same_memory(ram: &GuestRam) -> Arc<GuestRam> {
    let regions = 0..ram.layout().regions().len();
    let addresses: Vec<_> = regions.map(|region| ram.host_address(region)).collect();
    // SAFETY: the mappings of `ram`, which the tests keep longer.
    #[allow(unsafe_code)]
    let again = unsafe { GuestRam::options().adopt(ram.layout().clone(), &addresses) };
    Arc::new(again.unwrap())
}

/// Returns a descriptor of the virtual machine that another part of a program might have.
fn duplicate(guest: &Guest) -> VmFd {
    // SAFETY: the guest's descriptor is open.
    #[allow(unsafe_code)]
    let vm = unsafe { std::os::fd::BorrowedFd::borrow_raw(guest.vm.as_raw_fd()) };
    let duplicate = vm.try_clone_to_owned().unwrap().into_raw_fd();
    // SAFETY: a descriptor of a virtual machine, which the result owns.
    #[allow(unsafe_code)]
    unsafe { guest.kvm.create_vmfd_from_rawfd(duplicate) }.unwrap()
}

#[test]
fn second_registration_of_a_slot_is_refused() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    // KVM would accept it: the slot has this memory already.
    let again = same_memory(&guest.ram);
    for vm in [&guest.vm, &duplicate(&guest)] {
        let error = RamSlots::register(vm, &again, 0).unwrap_err();
        assert!(matches!(error, SlotError::InUse { slot: 0 }));
        let text = error.to_string();
        assert!(text.contains("memory slot 0") && text.contains("drop it first"));
    }
    // The refused calls removed nothing.
    guest.touch(&[HIGH]);

    // The number is free in another virtual machine, and after the drop.
    let other = create_vm(&guest.kvm).unwrap();
    drop(RamSlots::register(&other, &again, 0).unwrap());
    drop(guest.slots);
    drop(RamSlots::register(&guest.vm, &again, 0).unwrap());
}

#[test]
#[allow(unsafe_code)]
fn second_adoption_of_a_slot_is_refused() {
    needs!(Kvm);
    let guest = Guest::touching_adopted(&[7, 3]);
    let again = same_memory(&guest.ram);
    // SAFETY: slots 7 and 3 are of this memory, and stay so. The others are refused.
    let adopt = |slots: &[u32]| unsafe { RamSlots::adopt(&guest.vm, &again, slots) };
    assert!(matches!(adopt(&[7, 3]), Err(SlotError::InUse { slot: 7 })));
    assert!(matches!(adopt(&[0, 3]), Err(SlotError::InUse { slot: 3 })));
    assert!(matches!(adopt(&[5, 5]), Err(SlotError::InUse { slot: 5 })));
    let registered = RamSlots::register(&guest.vm, &again, 2);
    assert!(matches!(registered, Err(SlotError::InUse { slot: 3 })));
    let counted = adopt(&[7]);
    assert!(matches!(
        counted,
        Err(SlotError::SlotCount {
            given: 1,
            regions: 2
        })
    ));
    assert!(
        matches!(adopt(&[1 << 16, 8]), Err(SlotError::SlotNumber { slot, .. }) if slot == 1 << 16)
    );
    // Nothing stays taken by the refused calls.
    drop(guest.slots);
    drop(adopt(&[7, 3]).unwrap());
}

/// The contract of `adopt` is broken here: KVM refuses the start of the log.
#[rstest]
#[case::swapped(&[7, 3])]
#[case::one_of_no_slot(&[3, 8])]
fn log_of_wrong_slot_numbers_names_the_remedy(#[case] numbers: &[u32]) {
    needs!(Kvm);
    let regions = [(0, LOW_SIZE), (HIGH, HIGH_SIZE)];
    let slots = |vm: &VmFd, ram: &Arc<GuestRam>| {
        drop(adopted(vm, ram, &[3, 7]));
        // SAFETY: KVM refuses to change these slots, so they keep the memory of `ram`.
        #[allow(unsafe_code)]
        unsafe { RamSlots::adopt(vm, ram, numbers) }.unwrap()
    };
    let guest = Guest::with_slots(regions, |_| (), slots);
    let error = DirtyLog::start(&guest.slots).unwrap_err().to_string();
    let remedy = "pass the numbers that these slots have";
    assert!(error.contains(remedy), "{error}");
}

#[test]
fn slot_numbers_are_in_the_order_of_the_layout() {
    needs!(Kvm);
    let mut guest = Guest::touching_adopted(&[7, 3]);
    let log = guest.log(Reprotect::WhenMarked);
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    guest.touch(&[HIGH + 5 * PAGE]);
    guest.ram.set_baseline().unwrap(); // what the host wrote
    log.harvest_live().unwrap();
    assert!(marks.runs().any(|run| run.contains(&(LOW_SIZE + 5 * PAGE))));
    assert!(!marks.is_dirty(5 * PAGE).unwrap());
}

/// A VMM splits its memory: two slots have parts that are adjacent in guest-physical memory.
#[test]
fn region_may_be_split_over_adjacent_slots() {
    needs!(Kvm);
    let half = LOW_SIZE / 2;
    let regions = [(0, half), (half, half), (HIGH, HIGH_SIZE)];
    let slots = |vm: &VmFd, ram: &Arc<GuestRam>| adopted(vm, ram, &[4, 9, 1]);
    let mut guest = Guest::with_slots(regions, |_| (), slots);
    guest.boot(support::Program::Touch);
    let log = guest.log(Reprotect::WhenRead);
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    let touched = [half - PAGE, half, HIGH];
    guest.touch(&touched);
    guest.ram.set_baseline().unwrap();
    log.harvest_live().unwrap();
    for offset in [half - PAGE, half, LOW_SIZE] {
        assert!(marks.is_dirty(offset).unwrap(), "{offset:#x}");
    }
}

/// The documented way to add memory.
#[test]
#[allow(unsafe_code)]
fn plugged_memory_is_logged_after_adopting_a_larger_layout() {
    needs!(Kvm);
    let regions = [(0, LOW_SIZE), (HIGH, HIGH_SIZE)];
    let slots = |vm: &VmFd, ram: &Arc<GuestRam>| adopted(vm, ram, &[0, 1]);
    let mut guest = Guest::with_slots(regions, |_| (), slots);
    guest.boot(support::Program::Touch);
    guest.map_devices_up_to(HIGH + 2 * HIGH_SIZE);
    let log = guest.log(Reprotect::WhenRead);

    // The VMM maps the memory and sets its slot.
    let plugged = HIGH + HIGH_SIZE;
    let memory = GuestRam::new(RamLayout::single(plugged, HIGH_SIZE).unwrap()).unwrap();
    let region = kvm_userspace_memory_region {
        slot: 2,
        guest_phys_addr: plugged,
        memory_size: HIGH_SIZE,
        userspace_addr: memory.host_address(0).addr().get() as u64,
        flags: 0,
    };
    // SAFETY: `memory` is dropped at the end, after the virtual machine has run.
    unsafe { guest.vm.set_user_memory_region(region) }.unwrap();

    // It drops the log and the slots, and adopts all of the memory.
    let regions = [(0, LOW_SIZE), (HIGH, HIGH_SIZE), (plugged, HIGH_SIZE)];
    let addresses = [
        guest.ram.host_address(0),
        guest.ram.host_address(1),
        memory.host_address(0),
    ];
    let layout = RamLayout::new(regions).unwrap();
    // SAFETY: mappings of `guest.ram` and of `memory`, both of which outlive the result.
    let larger = unsafe { GuestRam::options().adopt(layout, &addresses) };
    let larger = Arc::new(larger.unwrap());
    drop(log);
    let smaller = Arc::clone(&guest.ram);
    let placeholder = create_vm(&guest.kvm).unwrap();
    guest.slots = Arc::new(RamSlots::register(&placeholder, &same_memory(&smaller), 0).unwrap());
    // SAFETY: the three slots were set to this memory, and stay so.
    let slots = unsafe { RamSlots::adopt(&guest.vm, &larger, &[0, 1, 2]) };
    let log = DirtyLog::start(&Arc::new(slots.unwrap())).unwrap();
    let marks = larger.dirty_bitmap();
    assert_eq!(marks.dirty_bytes(), larger.layout().ram_size());
    larger.set_baseline().unwrap();
    log.harvest_live().unwrap();
    larger.set_baseline().unwrap();

    guest.touch(&[plugged + PAGE, HIGH]);
    log.harvest_live().unwrap();
    for offset in [LOW_SIZE, LOW_SIZE + HIGH_SIZE + PAGE] {
        assert!(marks.is_dirty(offset).unwrap(), "{offset:#x}");
    }
}

/// A VMM owns its `VmFd`, without an `Arc`, and may close it first.
#[test]
fn slots_keep_the_virtual_machine_by_their_own_descriptor() {
    needs!(Kvm);
    struct Vmm {
        vm: VmFd,
    }
    let kvm = kvm_backend::open_kvm().unwrap();
    let vmm = Vmm {
        vm: create_vm(&kvm).unwrap(),
    };
    let ram = GuestRam::new(RamLayout::single(0, 1 << 20).unwrap()).unwrap();
    let slots = Arc::new(RamSlots::register(&vmm.vm, &Arc::new(ram), 0).unwrap());
    let vcpus = Vcpus::new(&vmm.vm).unwrap();
    let vcpu = vcpus.create(&vmm.vm, 0).unwrap();
    drop(vmm);
    let log = DirtyLog::start(&slots).unwrap();
    let harvest = log.harvest(vcpus.pause().unwrap()).unwrap();
    assert_eq!(harvest.stats().pages, 0);
    drop(vcpu);
}

#[test]
fn vcpu_of_another_virtual_machine_is_not_created() {
    needs!(Kvm);
    let (guest, other) = (Guest::new(), Guest::new());
    let error = guest.vcpus.create(&other.vm, 1).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    assert!(error.to_string().contains("another virtual machine"));
    drop(guest.vcpus.create(&duplicate(&guest), 1).unwrap());
}
