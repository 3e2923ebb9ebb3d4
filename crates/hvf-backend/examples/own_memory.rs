//! Adds snapshots to a VMM that has a virtual machine, memory and vCPU of its own, created by
//! `applevisor`.
//!
//! Run `cargo run --package ramsnap-hvf-backend --example own_memory [DIRECTORY]` on a Mac with
//! Apple silicon. The workspace's cargo runner signs the program with the entitlement that the
//! hypervisor requires.

#[cfg(hvf_fake)]
use fake_hvf as _;

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod snapshots {
    #![allow(unsafe_code)]

    use std::error::Error;
    use std::io;
    use std::ops::Range;
    use std::path::Path;
    use std::sync::Arc;

    use applevisor::memory::Memory;
    use applevisor::vcpu::{ExitReason, Vcpu};
    use applevisor_sys::{HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, hv_vm_protect};
    use dirty_bitmap::{Policy, TrackedBitmap, WriteProtection};
    use hvf_backend::{Exception, Exit, ExitAction, Stage2Tracker};
    use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
    use page_reader::{HostMemory, MappedMemory, RamLayout};

    /// The write protection of the VMM's memory, which begins at this guest-physical address.
    pub(crate) struct Stage2(u64);

    impl Stage2 {
        fn permit(&self, range: &Range<u64>, flags: u64) -> io::Result<()> {
            let size = (range.end - range.start) as usize;
            // SAFETY: the range is in the VMM's memory. Only the guest's permissions change.
            match unsafe { hv_vm_protect(self.0 + range.start, size, flags) } {
                0 => Ok(()),
                code => Err(io::Error::other(format!("hv_vm_protect: {code:#x}"))),
            }
        }
    }

    impl WriteProtection for Stage2 {
        type Error = io::Error;

        fn protect(&self, range: Range<u64>) -> io::Result<()> {
            self.permit(&range, HV_MEMORY_READ | HV_MEMORY_EXEC)
        }

        fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
            self.permit(&range, HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC)
        }
    }

    /// Tracks the writes to the memory, which the VMM has mapped into its guest.
    pub(crate) fn track(memory: &Memory) -> Result<Stage2Tracker<Stage2>, Box<dyn Error>> {
        let start = memory.guest_addr().ok_or("map the memory first")?;
        let size = memory.size() as u64;
        let bitmap = Arc::new(TrackedBitmap::tracked(0, size, hvf_backend::PAGE_SIZE)?);
        let layout = RamLayout::single(start, size)?;
        Ok(Stage2Tracker::new(
            layout,
            &bitmap,
            Policy::default(),
            Stage2(start),
        )?)
    }

    /// Runs the vCPU until an exit that the VMM handles.
    pub(crate) fn run(vcpu: &Vcpu, tracker: &Stage2Tracker<Stage2>) -> Result<(), Box<dyn Error>> {
        loop {
            let run_guard = tracker.enter();
            vcpu.run()?;
            let info = vcpu.get_exit_info();
            if info.reason != ExitReason::EXCEPTION {
                return Ok(()); // a timer, or a request of another thread
            }
            let exception = info.exception;
            let exit = Exit::Exception(Exception {
                syndrome: exception.syndrome,
                virtual_address: exception.virtual_address,
                physical_address: exception.physical_address,
            });
            if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Forward {
                return Ok(());
            }
        }
    }

    /// Saves the memory of the stopped guest: all of it, or what changed since the image `parent`.
    pub(crate) fn save(
        memory: &Memory,
        tracker: &Stage2Tracker<Stage2>,
        dest: &Path,
        parent: Option<ImageId>,
    ) -> Result<ImageId, Box<dyn Error>> {
        let epoch = tracker.checkpoint()?; // an error from here on restores the marks
        // SAFETY: the memory stays mapped while it is borrowed. The VMM writes it by pointers only.
        let ram = unsafe { HostMemory::new(memory.host_addr(), memory.size()) };
        let ram = MappedMemory::new(tracker.layout().clone(), [ram])?;
        let seal = parent.map_or(Seal::new(), |parent| Seal::new().parent(parent));
        let options = MemoryWriter::options().layout(Layout::Packed).seal(seal);
        let mut writer = options.open(dest, memory.size() as u64, hvf_backend::PAGE_SIZE)?;
        let id = writer.image_id().ok_or("a packed image has an id")?;
        match parent {
            None => writer.write_full(&ram)?,
            Some(_) => drop(writer.write_diff(&ram, epoch.bitmap())?),
        }
        writer.commit_and_release(epoch)?;
        Ok(id)
    }
}

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use applevisor::memory::MemPerms;
    use applevisor::vcpu::Reg;
    use applevisor::vm::VirtualMachine;

    const RAM: u64 = 0x8000_0000;
    /// Stores x0 at x1, and exits.
    const CODE: [u32; 2] = [
        0xf900_0020, // str x0, [x1]
        0xd400_0002, // hvc #0
    ];

    let dir = std::path::PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| ".".into()));
    let vm = VirtualMachine::new()?;
    let mut memory = vm.memory_create(16 << 20)?;
    memory.map(RAM, MemPerms::ReadWriteExec)?;
    for (address, code) in (RAM..).step_by(4).zip(CODE) {
        memory.write_u32(address, code)?;
    }
    let vcpu = vm.vcpu_create()?;
    vcpu.set_reg(Reg::CPSR, 0x3c5)?; // exception level 1, interrupts masked

    let tracker = snapshots::track(&memory)?;
    let mut parent = None;
    for number in 0..4 {
        let dest = dir.join(format!("{number}.mem"));
        parent = Some(snapshots::save(&memory, &tracker, &dest, parent)?);
        println!("{}: {parent:?}", dest.display());
        vcpu.set_reg(Reg::PC, RAM)?;
        vcpu.set_reg(Reg::X0, number + 1)?;
        vcpu.set_reg(Reg::X1, RAM + ((number + 1) << 20))?;
        snapshots::run(&vcpu, &tracker)?;
    }
    Ok(())
}

#[cfg(not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)))]
fn main() {
    eprintln!(
        "this example needs macOS on Apple silicon; for KVM, see the examples of kvm-backend"
    );
}
