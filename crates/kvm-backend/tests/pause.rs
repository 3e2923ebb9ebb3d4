//! The pause: the last harvest has what KVM writes to memory when it completes an instruction.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unsafe_code)]

mod support;

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;

use kvm_backend::{
    CaptureError, DirtyLog, HarvestError, PauseError, Reprotect, Vcpu, VcpuState, Vcpus,
};
use kvm_ioctls::VcpuExit;
use page_reader::PageReader;
use rstest::rstest;
use support::state::msrs;
use support::{DONE, Guest, LOW_SIZE, PAGE, Program};
use test_machine::needs;

/// The address to which a program makes KVM write, on a page that nothing else writes.
const TARGET: u64 = 0x30000;
const PORT: u16 = 0x90;
/// The byte that the devices return.
const ANSWER: u8 = 0x77;

/// Handles an exit as a device does.
fn answer(exit: VcpuExit<'_>) {
    match exit {
        VcpuExit::IoIn(PORT, data) | VcpuExit::MmioRead(_, data) => data.fill(ANSWER),
        other => panic!("{other:?}"),
    }
}

/// Saves the pages in the log into `image`, as a VMM that pauses its guest does.
fn save(guest: &mut Guest, log: &DirtyLog, image: &mut [u8]) -> VcpuState {
    guest.vcpu.complete_io(answer).unwrap();
    let paused = guest.vcpus.pause().unwrap();
    let state = VcpuState::capture(&msrs(&guest.kvm), &paused, &guest.vcpu).unwrap();
    let harvest = log.harvest(paused).unwrap();
    let epoch = harvest.begin_epoch().unwrap();
    for run in epoch.bitmap().runs() {
        let bytes = &mut image[run.start as usize..run.end as usize];
        guest.ram.read_at(run.start, bytes).unwrap();
    }
    drop(harvest);
    epoch.release().unwrap();
    state
}

#[rstest]
#[case::ins(Program::Ins, 1)]
#[case::string_ins(Program::Ins, 5)]
#[case::string_ins_of_more_than_one_exit(Program::Ins, 3 * PAGE)]
#[case::string_copy_from_mmio(Program::Movs, 5)]
#[case::push_from_mmio(Program::Push, 8)]
fn pending_read_is_in_the_image_and_the_state(
    #[case] program: Program,
    #[case] bytes: u64,
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut guest = Guest::booted(program);
    guest.map_devices_up_to(2 * LOW_SIZE);
    let log = guest.log(reprotect);
    let mut image = guest.image();
    guest.set_regs(|regs| {
        (regs.rdi, regs.rcx, regs.rdx) = (TARGET, bytes, u64::from(PORT));
        (regs.rsi, regs.rsp) = (LOW_SIZE + 0x1000, TARGET + 8);
    });
    // Only the first exit is handled.
    answer(guest.vcpu.run().unwrap());
    let refused = PauseError::IoPending { pending: 1 };
    assert_eq!(guest.vcpus.pause().unwrap_err(), refused);

    let state = save(&mut guest, &log, &mut image);
    assert!(image == guest.image(), "the image is not the RAM");
    assert_eq!(image[TARGET as usize], ANSWER, "the last write of KVM");

    // A new virtual machine runs to the end, with every byte in place.
    let new = Guest::new();
    new.ram.write_at(0, &image).unwrap();
    let _ = state.restore(&new.vm, &new.vcpu).unwrap();
    let Guest {
        mut vcpu,
        ram,
        slots: _slots,
        ..
    } = new;
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(DONE, _) => break,
            exit => answer(exit),
        }
    }
    let mut written = vec![0; bytes as usize];
    ram.read(TARGET, &mut written).unwrap();
    assert!(written.iter().all(|byte| *byte == ANSWER));
}

#[test]
fn pause_requires_completed_io_of_every_vcpu() {
    needs!(Kvm);
    let mut guest = Guest::booted(Program::TwoOuts);
    let mut second = guest.vcpus.create(&guest.vm, 1).unwrap();
    drop(guest.vcpus.pause().unwrap());
    guest.run();
    let refused = PauseError::IoPending { pending: 1 };
    assert_eq!(guest.vcpus.pause().unwrap_err(), refused);
    second.complete_io(|exit| panic!("{exit:?}")).unwrap();
    assert_eq!(guest.vcpus.pause().unwrap_err(), refused);
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    let paused = guest.vcpus.pause().unwrap();
    assert_eq!(guest.vcpus.pause().unwrap_err(), PauseError::AlreadyPaused);
    drop(paused);
    drop(guest.vcpus.pause().unwrap());

    // A closed vCPU has nothing to complete. An adopted one may have.
    guest.run();
    guest.vcpu.close();
    drop(guest.vcpus.pause().unwrap());
    let mut third = guest.vcpus.adopt(guest.vm.create_vcpu(2).unwrap());
    assert_eq!(guest.vcpus.pause().unwrap_err(), refused);
    third.complete_io(|exit| panic!("{exit:?}")).unwrap();
    drop(guest.vcpus.pause().unwrap());
}

/// KVM keeps a vCPU that has another descriptor.
#[test]
fn pause_is_refused_after_a_drop_with_pending_io() {
    needs!(Kvm);
    let mut guest = Guest::booted(Program::Ins);
    let log = guest.log(Reprotect::WhenRead);
    guest.set_regs(|regs| (regs.rdi, regs.rcx, regs.rdx) = (TARGET, 5, u64::from(PORT)));
    answer(guest.vcpu.run().unwrap());
    let Guest {
        vcpu,
        vcpus,
        slots: _slots,
        ram,
        vm,
        ..
    } = guest;
    // SAFETY: the vCPU has the descriptor open.
    let other = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let other = other.try_clone_to_owned().unwrap();
    drop(vcpu);
    let refused = PauseError::Abandoned { abandoned: 1 };
    assert_eq!(vcpus.pause().unwrap_err(), refused);

    // The reason: a harvest now would lack the write through the other descriptor.
    log.harvest_live().unwrap();
    ram.set_baseline().unwrap();
    // SAFETY: it is a descriptor of a vCPU of this virtual machine, and has no other owner.
    let other = unsafe { vm.create_vcpu_from_rawfd(other.into_raw_fd()) };
    let mut other = vcpus.adopt(other.unwrap());
    other.complete_io(answer).unwrap();
    assert!(log.harvest_live().unwrap().pages > 0);
    let mut written = [0; 1];
    ram.read(TARGET, &mut written).unwrap();
    assert_eq!(written, [ANSWER]);
    assert_eq!(vcpus.pause().unwrap_err(), refused);
}

#[test]
fn vcpu_dropped_without_pending_io_permits_a_pause() {
    needs!(Kvm);
    let mut guest = Guest::booted(Program::TwoOuts);
    drop(guest.vcpus.create(&guest.vm, 1).unwrap());
    drop(guest.vcpus.pause().unwrap());
    guest.run();
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    drop(guest.vcpu);
    drop(guest.vcpus.pause().unwrap());
    // This one was adopted, and never completed what may be pending.
    drop(guest.vcpus.adopt(guest.vm.create_vcpu(2).unwrap()));
    let refused = PauseError::Abandoned { abandoned: 1 };
    assert_eq!(guest.vcpus.pause().unwrap_err(), refused);
}

#[test]
fn adopted_vcpu_completes_after_a_failed_completion() {
    needs!(Kvm);
    let guest = Guest::booted(Program::TwoOuts);
    let mut adopted = guest.vcpus.adopt(guest.vm.create_vcpu(1).unwrap());
    // KVM_RUN fails, as it does without memory.
    adopted.get_kvm_run().kvm_dirty_regs = u64::MAX;
    adopted.complete_io(|exit| panic!("{exit:?}")).unwrap_err();
    assert_eq!(adopted.get_kvm_run().immediate_exit, 0);
    let refused = PauseError::IoPending { pending: 1 };
    assert_eq!(guest.vcpus.pause().unwrap_err(), refused);
    adopted.get_kvm_run().kvm_dirty_regs = 0;
    adopted.complete_io(|exit| panic!("{exit:?}")).unwrap();
    drop(guest.vcpus.pause().unwrap());
}

#[test]
fn vcpu_continues_after_a_panic_of_its_exit_handler() {
    needs!(Kvm);
    // A store to a device in two exits.
    let mut guest = Guest::booted(Program::WideStore);
    guest.map_devices_up_to(2 * LOW_SIZE);
    guest.set_regs(|regs| regs.rdi = LOW_SIZE);
    assert!(matches!(
        guest.vcpu.run(),
        Ok(VcpuExit::MmioWrite(LOW_SIZE, _))
    ));
    let vcpu = &mut guest.vcpu;
    let complete = std::panic::AssertUnwindSafe(|| vcpu.complete_io(|_| panic!("planned")));
    std::panic::catch_unwind(complete).unwrap_err();
    assert_eq!(guest.vcpu.get_kvm_run().immediate_exit, 0);
    let refused = PauseError::IoPending { pending: 1 };
    assert_eq!(guest.vcpus.pause().unwrap_err(), refused);
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    drop(guest.vcpus.pause().unwrap());
    assert!(matches!(guest.vcpu.run(), Ok(VcpuExit::IoOut(DONE, _))));
}

#[test]
fn pause_is_refused_while_a_vcpu_is_in_the_guest() {
    needs!(Kvm);
    let mut guest = Guest::booted(Program::Scatter);
    guest.set_regs(|regs| {
        regs.rdi = LOW_SIZE;
        regs.r10 = LOW_SIZE / PAGE - 32;
        regs.rdx = support::INPUT;
    });
    let (vcpu, vcpus, ram) = (&mut guest.vcpu, &guest.vcpus, &guest.ram);
    thread::scope(|scope| {
        let running = scope.spawn(|| support::run(vcpu));
        loop {
            match vcpus.pause() {
                Err(PauseError::Running { running: 1 }) => break,
                // The thread has not entered the guest yet.
                Ok(paused) => drop(paused),
                // Another signal may interrupt the vCPU.
                Err(PauseError::IoPending { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            thread::yield_now();
        }
        ram.write(support::INPUT, &[1]).unwrap(); // ends the program
        running.join().unwrap();
    });
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    drop(guest.vcpus.pause().unwrap());
}

/// The vCPU has a thread, which receives requests to run. The guest does not continue before the
/// last harvest is dropped.
#[test]
fn vcpu_threads_wait_for_the_end_of_the_pause() {
    needs!(Kvm);
    let guest = Guest::booted(Program::TwoOuts);
    let log = guest.log(Reprotect::WhenMarked);
    let Guest { vcpu, vcpus, .. } = guest;
    let turns = Arc::new(AtomicU32::new(0));
    let (go, orders) = mpsc::channel::<()>();
    let (done, answers) = mpsc::channel();
    let thread = thread::spawn({
        let turns = Arc::clone(&turns);
        move || {
            let mut vcpu: Vcpu = vcpu;
            for () in orders {
                let byte = support::run(&mut vcpu);
                turns.fetch_add(1, Ordering::SeqCst);
                vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
                done.send(byte).unwrap();
            }
        }
    });
    go.send(()).unwrap();
    let first = answers.recv().unwrap();
    let harvest = log.harvest(vcpus.pause().unwrap()).unwrap();
    go.send(()).unwrap();
    // However long this takes, the vCPU stays out of the guest.
    for _ in 0..1000 {
        thread::yield_now();
        assert_eq!(turns.load(Ordering::SeqCst), 1);
    }
    assert!(harvest.stats().page_size > 0);
    drop(harvest);
    assert_eq!(answers.recv().unwrap(), first + 1);
    drop(go);
    thread.join().unwrap();
}

#[test]
fn vcpus_of_another_vm_are_refused() {
    needs!(Kvm);
    let (guest, other) = (Guest::booted(Program::Mix), Guest::booted(Program::Mix));
    let log = guest.log(Reprotect::WhenRead);
    let paused = other.vcpus.pause().unwrap();
    let state = VcpuState::capture(&msrs(&guest.kvm), &paused, &guest.vcpu);
    assert!(matches!(state, Err(CaptureError::NotPaused)));
    assert!(matches!(
        log.harvest(paused),
        Err(HarvestError::OtherMachine)
    ));
    // Another set of the same virtual machine: its vCPUs may run.
    let unknown = Vcpus::new(&guest.vm).unwrap();
    assert_eq!(unknown.pause().unwrap_err(), PauseError::NoVcpu);
    let _second = unknown.create(&guest.vm, 1).unwrap();
    let paused = unknown.pause().unwrap();
    let state = VcpuState::capture(&msrs(&guest.kvm), &paused, &guest.vcpu);
    assert!(matches!(state, Err(CaptureError::NotPaused)));
}
