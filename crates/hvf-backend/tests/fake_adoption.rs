//! VMMs that create the machine and the vCPUs themselves, by the framework or by `applevisor`.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]
#![allow(unsafe_code)]

mod support;

use std::ptr;
use std::sync::{Arc, Barrier};
use std::thread;

use applevisor_sys::{
    hv_vcpu_create, hv_vcpu_destroy, hv_vcpu_exit_t, hv_vcpu_run, hv_vm_create, hv_vm_destroy,
};
use dirty_bitmap::Policy;
use fake_hvf::control;
use hvf_backend::el1;
use hvf_backend::{AdoptVcpuError, Exit, ExitAction, GuestRam, PAGE_SIZE, Stage2, VcpuState, Vm};
use page_reader::RamLayout;

const RAM: u64 = 0x8000_0000;
const SIZE: u64 = 1 << 20;
const PROGRAM: u64 = RAM + PAGE_SIZE;
const DATA: u64 = RAM + 8 * PAGE_SIZE;

/// `str x0, [x1]; hvc #0`
const STORE: [u32; 2] = [0xf900_0020, 0xd400_0002];

fn ram(code: &[u32]) -> Arc<GuestRam> {
    let ram = Arc::new(GuestRam::new(RamLayout::single(RAM, SIZE).unwrap()).unwrap());
    ram.write(RAM, &el1::page_table()).unwrap();
    let code: Vec<u8> = code.iter().copied().flat_map(u32::to_le_bytes).collect();
    ram.write(PROGRAM, &code).unwrap();
    ram
}

fn start() -> VcpuState {
    let mut state = support::start_state();
    (state.x[0], state.x[1]) = (7, DATA);
    state
}

/// A vCPU that the VMM has created.
struct OwnVcpu {
    id: u64,
    exit: *const hv_vcpu_exit_t,
}

impl OwnVcpu {
    fn new() -> Self {
        let (mut id, mut exit) = (0, ptr::null());
        // SAFETY: both addresses are of variables.
        let code = unsafe { hv_vcpu_create(&raw mut id, &raw mut exit, ptr::null_mut()) };
        assert_eq!(code, 0);
        Self { id, exit }
    }

    fn run(&self) -> Exit {
        // SAFETY: the vCPU exists and is of this thread.
        assert_eq!(unsafe { hv_vcpu_run(self.id) }, 0);
        // SAFETY: the structure exists as long as the vCPU, and its reason is one of the header's.
        unsafe { *self.exit }.into()
    }
}

impl Drop for OwnVcpu {
    fn drop(&mut self) {
        // SAFETY: the vCPU exists and is of this thread.
        assert_eq!(unsafe { hv_vcpu_destroy(self.id) }, 0);
    }
}

/// Creates a machine that is not of this crate.
fn create() {
    // SAFETY: no configuration is passed.
    assert_eq!(unsafe { hv_vm_create(ptr::null_mut()) }, 0);
}

fn destroy() {
    // SAFETY: the machine exists.
    assert_eq!(unsafe { hv_vm_destroy() }, 0);
}

fn adopt() -> Vm {
    // SAFETY: the tests drop the value before they destroy the machine.
    unsafe { Vm::options().adopt(()) }.unwrap()
}

#[test]
fn an_adopted_machine_is_tracked_and_captured() {
    let _turn = control::turn();
    create();
    let own = OwnVcpu::new();
    let vm = adopt();
    let tracker = Stage2::map(&vm, &ram(&STORE)).unwrap();
    let tracker = tracker.track(Policy::Pages).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
    // SAFETY: the vCPU is destroyed below.
    let vcpu = unsafe { vm.adopt_vcpu(own.id, 0) }.unwrap();
    let _ = start().restore(&vcpu, 0).unwrap();
    let mut faults = 0;
    loop {
        let run_guard = tracker.enter();
        let exit = own.run();
        match tracker.handle_exit(&run_guard, &exit).unwrap() {
            ExitAction::Resume => faults += 1,
            ExitAction::Forward => break,
        }
    }
    assert_eq!(faults, 1);
    let epoch = tracker.checkpoint().unwrap();
    assert!(epoch.bitmap().is_dirty(DATA - RAM).unwrap());
    assert_eq!(VcpuState::capture(&vcpu).unwrap().x[0], 7);
    drop((vcpu, epoch, tracker, vm));
    // Both still exist.
    drop(own);
    destroy();
}

#[test]
fn exits_of_the_framework_are_converted() {
    use applevisor_sys::{hv_exit_reason_t as Reason, hv_vcpu_exit_exception_t};
    let exit = |reason| {
        let exception = hv_vcpu_exit_exception_t {
            syndrome: 1,
            virtual_address: 2,
            physical_address: 3,
        };
        Exit::from(hv_vcpu_exit_t { reason, exception })
    };
    assert_eq!(exit(Reason::CANCELED), Exit::Canceled);
    assert_eq!(exit(Reason::VTIMER_ACTIVATED), Exit::VtimerActivated);
    assert_eq!(exit(Reason::UNKNOWN), Exit::Unknown(3));
    let Exit::Exception(found) = exit(Reason::EXCEPTION) else {
        panic!("another exit");
    };
    let numbers = (
        found.syndrome,
        found.virtual_address,
        found.physical_address,
    );
    assert_eq!(numbers, (1, 2, 3));
}

#[test]
fn adopted_ram_stays_mapped_in_the_guest() {
    let _turn = control::turn();
    create();
    let ram = ram(&STORE);
    let vm = adopt();
    let owner = Stage2::map(&vm, &ram).unwrap();
    // SAFETY: `owner` keeps the RAM mapped.
    let tracker = unsafe { Stage2::adopt(&vm, &ram) }.unwrap();
    let tracker = tracker.track(Policy::Pages).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
    drop(tracker.stop().unwrap());
    assert_eq!(control::mapped().len(), 1);
    // The guest writes without a fault.
    let mut vcpu = vm.create_vcpu().unwrap();
    let _ = start().restore(&vcpu, 0).unwrap();
    let exit = vcpu.run().unwrap();
    let is_hvc = matches!(exit, Exit::Exception(found) if found.syndrome >> 26 == 0x16);
    assert!(is_hvc, "{exit:x?}");
    drop(vcpu);
    drop((owner, vm));
    destroy();
}

#[test]
fn a_vcpu_of_another_thread_is_not_adopted() {
    let _turn = control::turn();
    create();
    let own = OwnVcpu::new();
    let (vm, id) = (adopt(), own.id);
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            // SAFETY: the vCPU exists.
            let adopted = unsafe { vm.adopt_vcpu(id, 0) };
            adopted.map(drop).unwrap_err()
        });
        let error = other.join().unwrap();
        let refused = matches!(error, AdoptVcpuError::Refused { .. });
        assert!(refused, "{error:?}");
        assert!(error.to_string().contains("the thread that created it"));
    });
    // SAFETY: the vCPU is destroyed below.
    let adopted = unsafe { vm.adopt_vcpu(own.id, 0) }.unwrap();
    // SAFETY: as above.
    let twice = unsafe { vm.adopt_vcpu(own.id, 0) }.map(drop).unwrap_err();
    assert_eq!(twice, AdoptVcpuError::Adopted { id: own.id });
    drop(adopted);
    // SAFETY: as above.
    drop(unsafe { vm.adopt_vcpu(own.id, 0) }.unwrap());
    drop((own, vm));
    destroy();
}

#[test]
fn adopted_vcpus_are_paused() {
    let _turn = control::turn();
    create();
    let vm = adopt();
    let stage2 = Stage2::map(&vm, &ram(&[0x1400_0000])).unwrap(); // b .
    let ready = Barrier::new(3);
    thread::scope(|scope| {
        for index in 0..2 {
            let (vm, ready) = (&vm, &ready);
            scope.spawn(move || {
                let own = OwnVcpu::new();
                // SAFETY: the vCPU is destroyed at the end of this function, after `vcpu`.
                let mut vcpu = unsafe { vm.adopt_vcpu(own.id, index) }.unwrap();
                let _ = start().restore(&vcpu, 0).unwrap();
                ready.wait();
                while !vcpu.is_pausing() {
                    assert_eq!(own.run(), Exit::Canceled);
                }
                vcpu.park();
                drop(vcpu);
            });
        }
        ready.wait();
        drop(vm.pause().unwrap());
    });
    drop((stage2, vm));
    destroy();
}

#[cfg(feature = "applevisor")]
mod of_applevisor {
    use applevisor::memory::MemPerms;
    use applevisor::vcpu::Reg;
    use applevisor::vm::VirtualMachine;

    use super::*;

    #[test]
    fn objects_of_applevisor_stay_usable() {
        let _turn = control::turn();
        let machine = VirtualMachine::new().unwrap();
        let mut memory = machine.memory_create(SIZE as usize).unwrap();
        memory.map(RAM, MemPerms::ReadWriteExec).unwrap();
        for (address, code) in (PROGRAM..).step_by(4).zip(STORE) {
            memory.write_u32(address, code).unwrap();
        }
        let own = machine.vcpu_create().unwrap();
        let vm = Vm::options().adopt_applevisor(&machine).unwrap();
        let vcpu = vm.adopt_applevisor_vcpu(&own, 0).unwrap();
        let layout = RamLayout::single(RAM, SIZE).unwrap();
        let start = ptr::NonNull::new(memory.host_addr()).unwrap();
        // SAFETY: `memory` outlives the RAM, and is accessed by pointers.
        let ram = unsafe { GuestRam::options().adopt(layout, &[start]) }.unwrap();
        // SAFETY: `memory` is mapped into the guest.
        let stage2 = unsafe { Stage2::adopt(&vm, &Arc::new(ram)) }.unwrap();
        let tracker = stage2.track(Policy::Pages).unwrap();
        tracker.checkpoint().unwrap().release().unwrap();
        own.set_reg(Reg::CPSR, 0x3c5).unwrap();
        own.set_reg(Reg::PC, PROGRAM).unwrap();
        own.set_reg(Reg::X0, 9).unwrap();
        own.set_reg(Reg::X1, DATA).unwrap();
        loop {
            let run_guard = tracker.enter();
            own.run().unwrap();
            let exit = own.get_exit_info().into();
            if tracker.handle_exit(&run_guard, &exit).unwrap() == ExitAction::Forward {
                break;
            }
        }
        assert!(
            tracker
                .checkpoint()
                .unwrap()
                .bitmap()
                .is_dirty(DATA - RAM)
                .unwrap()
        );
        assert_eq!(VcpuState::capture(&vcpu).unwrap().x[0], 9);
        assert_eq!(vcpu.register(Reg::X1), Ok(DATA));
        drop((vcpu, tracker, vm));
        // The objects of applevisor still work, and the machine ends with them.
        assert_eq!(memory.read_u64(DATA).unwrap(), 9);
        drop((own, memory, machine));
        VirtualMachine::new().unwrap();
    }

    #[test]
    fn a_machine_of_applevisor_lives_as_long_as_adopted() {
        let _turn = control::turn();
        let machine = VirtualMachine::new().unwrap();
        let vm = Vm::options().adopt_applevisor(&machine).unwrap();
        drop(machine);
        // It exists, so that another can't be created.
        VirtualMachine::new().map(drop).unwrap_err();
        let _vcpu = vm.create_vcpu().unwrap();
    }
}

#[cfg(feature = "macos-15")]
#[test]
fn an_adopted_interrupt_controller_is_captured() {
    let _turn = control::turn();
    let place = support::GIC;
    let created = Vm::options().gic(place).create().unwrap();
    let own = OwnVcpu::new();
    // SAFETY: the owner keeps the machine.
    let vm = unsafe { Vm::options().gic(place).adopt(created) }.unwrap();
    // SAFETY: the vCPU is destroyed below.
    let vcpu = unsafe { vm.adopt_vcpu(own.id, 0) }.unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(state.creation_index, Some(0));
    assert!(!vm.capture_gic().unwrap().data().is_empty());
    drop(vcpu);
    drop((own, vm));
}
