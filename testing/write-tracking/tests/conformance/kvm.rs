//! KVM guests, whose vCPUs run in 64-bit user mode.

#![allow(unsafe_code)]

#[path = "../../../../crates/kvm-backend/tests/support/mod.rs"]
pub(super) mod support;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use dirty_bitmap::WriteProtection;
use kvm_backend::{GuestRam, RamSlots, long_mode, open_kvm};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use page_reader::{PageReader, RamLayout};
use support::{CODE, DONE, INPUT, INPUT_SIZE, Program, STACK, TABLES};
use test_machine::Need;
use write_faults::{FaultHandler, PageFaults, Userfaultfd};
use write_tracking::{Backend, HIGH, HIGH_SIZE, LOW_SIZE, Tracker, handle_fault};

/// A virtual machine whose slots belong to an `S`.
struct Vm<S> {
    vcpus: Vec<Mutex<VcpuFd>>,
    /// The owner of the memory slots. It removes the RAM from the VM before the RAM is unmapped.
    slots: S,
    ram: Arc<GuestRam>,
    /// The memory file, for host writes that bypass the mapping.
    file: File,
}

/// A KVM guest whose RAM is protected by userfaultfd.
pub(super) struct UserfaultedVm {
    vm: Vm<RamSlots>,
    userfaultfd: Userfaultfd,
}

/// A KVM guest with a memory slot for each page, which is made read-only.
///
/// The RAM is small, because slots are few. There is one vCPU, because a slot can't be changed
/// while a vCPU runs.
pub(super) struct ReadOnlyVm {
    vm: Vm<Arc<Slots>>,
}

impl Backend for UserfaultedVm {
    type Protection = Userfaultfd;

    const NEEDS: &'static [Need] = &[Need::Kvm, Need::Userfaultfd];
    const LATE_FAULTS: bool = true;

    fn new(_page_size: u64) -> Self {
        let (kvm, vm, ram) = new_vm(Self::REGIONS);
        let slots = RamSlots::register(&vm, &ram, 0).unwrap();
        let vm = Vm::new(&kvm, &vm, ram, 8, slots);
        let userfaultfd = Userfaultfd::new(&vm.ram, LOW_SIZE + HIGH_SIZE, 3).unwrap();
        Self { vm, userfaultfd }
    }

    fn protection(&self) -> Userfaultfd {
        self.userfaultfd.clone()
    }

    fn serve_faults(&self, tracker: &Arc<Tracker>) -> Option<FaultHandler> {
        let tracker = Arc::clone(tracker);
        let handler = self
            .userfaultfd
            .answer(move |offset| handle_fault(&tracker, offset));
        Some(handler.unwrap())
    }

    fn wait_until_handled(&self) {
        self.userfaultfd.wait_until_answered();
    }

    fn ram(&self) -> &(impl PageReader + Send + Sync) {
        &*self.vm.ram
    }

    fn vcpus(&self) -> usize {
        self.vm.vcpus.len()
    }

    fn increment(&self, tracker: &Tracker, vcpu: usize, addresses: &[u64]) {
        self.vm.increment(tracker, vcpu, addresses);
    }

    fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        self.vm.host_write(guest_start, bytes);
    }

    fn file(&self) -> &File {
        &self.vm.file
    }
}

impl Backend for ReadOnlyVm {
    type Protection = ReadOnly;

    const NEEDS: &'static [Need] = &[Need::Kvm];
    const REGIONS: [(u64, u64); 2] = [(0, 0x60000), (HIGH, 0x20000)];
    const LATE_FAULTS: bool = false;

    fn new(page_size: u64) -> Self {
        let (kvm, vm, ram) = new_vm(Self::REGIONS);
        let slots = Arc::new(Slots::new(&vm, &ram, page_size));
        Self {
            vm: Vm::new(&kvm, &vm, ram, 1, slots),
        }
    }

    fn protection(&self) -> ReadOnly {
        ReadOnly(Arc::clone(&self.vm.slots))
    }

    fn ram(&self) -> &(impl PageReader + Send + Sync) {
        &*self.vm.ram
    }

    fn vcpus(&self) -> usize {
        self.vm.vcpus.len()
    }

    fn increment(&self, tracker: &Tracker, vcpu: usize, addresses: &[u64]) {
        self.vm.increment(tracker, vcpu, addresses);
    }

    fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        self.vm.host_write(guest_start, bytes);
    }

    fn file(&self) -> &File {
        &self.vm.file
    }
}

fn new_vm(regions: [(u64, u64); 2]) -> (Kvm, Arc<VmFd>, Arc<GuestRam>) {
    let kvm = open_kvm().unwrap();
    let vm = Arc::new(kvm_backend::create_vm(&kvm).unwrap());
    let layout = RamLayout::new(regions).unwrap();
    let ram = GuestRam::options().memfd("guest").allocate(layout);
    (kvm, vm, Arc::new(ram.unwrap()))
}

impl<S> Vm<S> {
    fn new(kvm: &Kvm, vm: &VmFd, ram: Arc<GuestRam>, vcpus: u64, slots: S) -> Self {
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
            slots,
            file: File::from(ram.memfd().unwrap().try_clone_to_owned().unwrap()),
            ram,
        }
    }

    fn increment(&self, tracker: &Tracker, vcpu: usize, addresses: &[u64]) {
        let space = INPUT_SIZE / self.vcpus.len() as u64;
        let input = INPUT + space * vcpu as u64;
        let mut vcpu = self.vcpus[vcpu].lock().unwrap();
        for addresses in addresses.chunks((space / 8) as usize) {
            let list: Vec<u8> = addresses.iter().flat_map(|a| a.to_le_bytes()).collect();
            self.host_write(input, &list);
            tracker.mark_host_write(input, list.len() as u64).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rsi, regs.rcx) = (CODE, input, addresses.len() as u64);
            vcpu.set_regs(&regs).unwrap();
            loop {
                let run_guard = tracker.enter();
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
                        drop(run_guard);
                        let offset = tracker.layout().offset_of(address).unwrap();
                        handle_fault(tracker, offset).unwrap();
                        self.host_write(address, data);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        let offset = self.ram.layout().offset_of(guest_start).unwrap();
        self.file.write_all_at(bytes, offset).unwrap();
    }
}

/// A memory slot for each page.
pub(super) struct Slots {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    page_size: u64,
    /// Whether the slot of each page of the memory file is read-only. To change it, the slot is
    /// deleted and created again.
    read_only: Mutex<Vec<bool>>,
}

pub(super) struct ReadOnly(Arc<Slots>);

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
