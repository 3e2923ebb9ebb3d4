//! A VMM with one vCPU, guest memory of `vm-memory`, and memory slots of its own.
#![allow(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_backend::{DirtyLog, GuestRam, MsrList, RamSlots, Vcpu, VcpuState, Vcpus};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use memory_image::{Chain, GuestMemoryTarget, Image, ImageId, Layout};
use memory_writer::{MemoryWriter, Seal};
use page_reader::PageReader;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub(super) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SLOTS: [u32; 2] = [3, 7];
const MIB: usize = 1 << 20;
const HIGH: u64 = 4 << 30;
/// inc byte [bx]; mov al, [bx]; out 0x80, al; add bx, 0x1000; jmp back
const PROGRAM: &[u8] = b"\xfe\x07\x8a\x07\xe6\x80\x81\xc3\x00\x10\xeb\xf4";

pub(super) struct Vmm {
    vcpu: Vcpu,
    vcpus: Vcpus,
    log: DirtyLog,
    msrs: MsrList,
    ram: Arc<GuestRam>,
    memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
    vm: VmFd,
}

impl Vmm {
    pub(super) fn new(kvm: &Kvm) -> Result<Self> {
        let vm = kvm.create_vm()?;
        let ranges = [(GuestAddress(0), MIB), (GuestAddress(HIGH), MIB)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges)?);
        for (slot, region) in SLOTS.iter().zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot: *slot,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the memory is mapped until the vCPU and the virtual machine are closed.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let ram = guest_ram::GuestRam::from_guest_memory(memory.clone())?; // ramsnap
        let ram = Arc::new(GuestRam::from(ram)); // ramsnap
        // SAFETY: the slots of this memory, set above. They stay until the end.
        let slots = unsafe { RamSlots::adopt(&vm, &ram, &SLOTS) }?; // ramsnap
        let (vcpus, msrs) = (Vcpus::new(&vm)?, MsrList::query(kvm)?); // ramsnap
        let devices = memory.clone(); // ramsnap
        let log = DirtyLog::options() // ramsnap
            .mark_host_writes(move |bitmap| bitmap.mark_guest_memory(&devices)) // ramsnap
            .start(&Arc::new(slots))?; // ramsnap
        Ok(Self {
            vcpu: vcpus.create(&vm, 0)?, // instead of `vm.create_vcpu(0)?`
            vcpus,
            log,
            msrs,
            ram,
            memory,
            vm,
        })
    }

    /// Loads the program, as a device writes: the next harvest marks the page.
    pub(super) fn boot(&self) -> Result<()> {
        self.memory.write_slice(PROGRAM, GuestAddress(0x1000))?;
        let (mut sregs, mut regs) = (self.vcpu.get_sregs()?, self.vcpu.get_regs()?);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        (regs.rip, regs.rbx, regs.rflags) = (0x1000, 0x4000, 2);
        self.vcpu.set_sregs(&sregs)?;
        Ok(self.vcpu.set_regs(&regs)?)
    }

    /// Runs the guest until it has written a page, and returns the new byte of the page.
    pub(super) fn step(&mut self) -> Result<u8> {
        match self.vcpu.run()? {
            VcpuExit::IoOut(0x80, byte) => Ok(byte[0]),
            exit => Err(format!("{exit:?}").into()),
        }
    }

    /// Saves the pages written since the image `parent`, or all pages.
    pub(super) fn save(
        &mut self,
        to: &Path,
        parent: Option<ImageId>,
    ) -> Result<(Option<ImageId>, u64)> {
        self.vcpu.complete_io(|_| ())?; // ramsnap
        let paused = self.vcpus.pause()?; // ramsnap
        let state = VcpuState::capture(&self.msrs, &paused, &self.vcpu)?; // ramsnap
        let harvest = self.log.harvest(paused)?; // ramsnap
        let epoch = harvest.begin_epoch()?; // ramsnap
        let seal = parent.into_iter().fold(Seal::new(), Seal::parent); // ramsnap
        let options = MemoryWriter::options().layout(Layout::Sealed).seal(seal); // ramsnap
        let mut writer = options.open(to, self.ram.layout().ram_size(), 4096)?; // ramsnap
        let pages = match parent {
            None => writer
                .write_full(&*self.ram)
                .map(|()| epoch.bitmap().dirty_pages())?,
            Some(_) => writer.write_diff(&*self.ram, epoch.bitmap())?,
        };
        writer.set_metadata(state.to_bytes())?; // ramsnap
        let id = writer.image_id();
        writer.commit_and_release(epoch)?; // ramsnap
        Ok((id, pages))
    }

    /// Continues the guest of these images in this new virtual machine.
    pub(super) fn restore(&self, images: &[PathBuf]) -> Result<()> {
        let newest = Image::open(images.last().ok_or("no image")?)?;
        let state = VcpuState::from_bytes(&newest.footer().ok_or("no footer")?.metadata)?;
        let chain = Chain::open_sealed(images)?;
        chain.restore(&mut GuestMemoryTarget::new(&*self.memory)?)?; // ramsnap
        self.ram.set_baseline()?; // ramsnap
        let id = chain.id().map(ImageId::to_bytes); // ramsnap
        self.ram.dirty_bitmap().set_parent_id(id); // ramsnap
        let _ = state.restore(&self.vm, &self.vcpu)?; // ramsnap
        Ok(())
    }

    pub(super) fn contents(&self) -> Result<Vec<u8>> {
        let mut contents = vec![0; 2 * MIB];
        self.ram.read_at(0, &mut contents)?;
        Ok(contents)
    }
}
