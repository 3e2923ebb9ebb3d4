//! KVM guests, whose vCPUs run in 64-bit user mode.

#![allow(unsafe_code)]

#[path = "../../../../kvm-backend/tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use dirty_bitmap::{Policy, WriteProtection};
use kvm_backend::{GuestRam, RamSlots, long_mode, open_kvm};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use page_reader::{PageReader, RamLayout};
use support::{CODE, DONE, INPUT, INPUT_SIZE, Program, STACK, TABLES};
use write_faults::{PageFaults, Userfaultfd};

use super::{
    Guest, HIGH, HIGH_SIZE, LOW_SIZE, Machine, Protection, Tracker, handle_fault, new_tracker,
};

struct Vm {
    vcpus: Vec<Mutex<VcpuFd>>,
    /// The owner of the memory slots. It removes the RAM from the VM before the RAM is unmapped.
    _slots: Box<dyn Send + Sync>,
    ram: Arc<GuestRam>,
    /// The memory file, for host writes that bypass the mapping.
    file: File,
}

pub(super) fn by_userfaultfd(page_size: u64, policy: Policy) -> Machine {
    let regions = [(0, LOW_SIZE), (HIGH, HIGH_SIZE)];
    let (kvm, vm, ram) = new_vm(regions);
    let slots = RamSlots::register(&vm, &ram, 0).unwrap();
    let guest = Vm::new(&kvm, &vm, ram, 8, slots);

    let userfaultfd = Userfaultfd::new(&guest.ram, LOW_SIZE + HIGH_SIZE, 3).unwrap();
    let by = Protection::new(userfaultfd.clone());
    let tracker = new_tracker(regions, page_size, policy, by);
    let of_handler = Arc::clone(&tracker);
    let handler = userfaultfd.answer(move |offset| handle_fault(&of_handler, offset));
    Machine {
        _handler: Some(handler.unwrap()),
        wait_until_handled: Box::new(move || userfaultfd.wait_until_answered()),
        tracker,
        ram: Arc::clone(&guest.ram) as _,
        guest: Box::new(guest),
    }
}

/// Each page has its own slot, so the RAM is small. There is one vCPU, because a slot can't be
/// changed while a vCPU runs.
pub(super) fn by_read_only_slots(page_size: u64, policy: Policy) -> Machine {
    let regions = [(0, 0x60000), (HIGH, 0x20000)];
    let (kvm, vm, ram) = new_vm(regions);
    let slots = Arc::new(Slots::new(&vm, &ram, page_size));
    let guest = Vm::new(&kvm, &vm, ram, 1, Arc::clone(&slots));
    let tracker = new_tracker(regions, page_size, policy, Protection::new(ReadOnly(slots)));
    Machine {
        _handler: None,
        wait_until_handled: Box::new(|| ()),
        tracker,
        ram: Arc::clone(&guest.ram) as _,
        guest: Box::new(guest),
    }
}

fn new_vm(regions: [(u64, u64); 2]) -> (Kvm, Arc<VmFd>, Arc<GuestRam>) {
    let kvm = open_kvm().unwrap();
    let vm = Arc::new(kvm_backend::create_vm(&kvm).unwrap());
    let layout = RamLayout::new(regions).unwrap();
    let ram = GuestRam::options().memfd("guest").allocate(layout);
    (kvm, vm, Arc::new(ram.unwrap()))
}

impl Vm {
    fn new(
        kvm: &Kvm,
        vm: &VmFd,
        ram: Arc<GuestRam>,
        vcpus: u64,
        slots: impl Send + Sync + 'static,
    ) -> Self {
        ram.write(CODE, Program::Touch.bytes()).unwrap();
        let vcpu = |number| {
            let vcpu = vm.create_vcpu(number).unwrap();
            let start = long_mode::Start {
                entry: CODE,
                stack: STACK,
                page_tables: TABLES,
            };
            long_mode::boot(kvm, &ram, &vcpu, &start).unwrap();
            Mutex::new(vcpu)
        };
        Self {
            vcpus: (0..vcpus).map(vcpu).collect(),
            _slots: Box::new(slots),
            file: File::from(ram.memfd().unwrap().try_clone_to_owned().unwrap()),
            ram,
        }
    }
}

impl Guest for Vm {
    fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    fn increment(&self, tracker: &Tracker, vcpu: usize, addresses: &[u64]) {
        let space = INPUT_SIZE / self.vcpus.len() as u64;
        let input = INPUT + space * vcpu as u64;
        let mut vcpu = self.vcpus[vcpu].lock().unwrap();
        for addresses in addresses.chunks((space / 8) as usize) {
            let list: Vec<u8> = addresses.iter().flat_map(|a| a.to_le_bytes()).collect();
            self.host_write(tracker.layout(), input, &list);
            tracker.mark_host_write(input, list.len() as u64).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rsi, regs.rcx) = (CODE, input, addresses.len() as u64);
            vcpu.set_regs(&regs).unwrap();
            loop {
                let in_guest = tracker.enter();
                let exit = match vcpu.run() {
                    // The kernel may interrupt a vCPU that waits for the handling of a fault.
                    Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {
                        continue;
                    }
                    exit => exit.unwrap(),
                };
                match exit {
                    VcpuExit::IoOut(DONE, _) => break,
                    // A write to a read-only slot. KVM leaves the write to the VMM, and resumes
                    // after the instruction.
                    VcpuExit::MmioWrite(address, data) => {
                        drop(in_guest);
                        let offset = tracker.layout().offset_of(address).unwrap();
                        handle_fault(tracker, offset).unwrap();
                        self.host_write(tracker.layout(), address, data);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn host_write(&self, layout: &RamLayout, guest_start: u64, bytes: &[u8]) {
        let offset = layout.offset_of(guest_start).unwrap();
        self.file.write_all_at(bytes, offset).unwrap();
    }
}

/// A memory slot for each page.
struct Slots {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    page_size: u64,
    /// Whether the slot of each page of the memory file is read-only. To change it, the slot is
    /// deleted and created again.
    read_only: Mutex<Vec<bool>>,
}

struct ReadOnly(Arc<Slots>);

impl Slots {
    fn new(vm: &Arc<VmFd>, ram: &Arc<GuestRam>, page_size: u64) -> Self {
        let pages = (ram.layout().ram_size() / page_size) as usize;
        let slots = Self {
            vm: Arc::clone(vm),
            ram: Arc::clone(ram),
            page_size,
            read_only: Mutex::new(vec![false; pages]),
        };
        for page in 0..pages {
            slots.put(page, page_size, 0).unwrap();
        }
        slots
    }

    fn put(&self, page: usize, memory_size: u64, flags: u32) -> io::Result<()> {
        let offset = page as u64 * self.page_size;
        let host = self.ram.host_memory(offset, self.page_size as usize);
        let region = kvm_userspace_memory_region {
            slot: page as u32,
            flags,
            guest_phys_addr: self.ram.layout().guest_address_of(offset).unwrap(),
            memory_size,
            userspace_addr: host.unwrap().as_ptr() as u64,
        };
        // SAFETY: the address is that of the page in the mapping that `self.ram` owns, and `drop`
        // removes all slots before it is unmapped.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }

    fn set(&self, range: Range<u64>, read_only: bool) -> io::Result<()> {
        let mut now = self.read_only.lock().unwrap();
        for page in range.start / self.page_size..range.end / self.page_size {
            let page = page as usize;
            if now[page] != read_only {
                let flags = if read_only { KVM_MEM_READONLY } else { 0 };
                self.put(page, 0, 0)?;
                self.put(page, self.page_size, flags)?;
                now[page] = read_only;
            }
        }
        Ok(())
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        for page in 0..self.read_only.lock().unwrap().len() {
            self.put(page, 0, 0).unwrap();
        }
    }
}

impl WriteProtection for ReadOnly {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        self.0.set(range, true)
    }

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        self.0.set(range, false)
    }
}
