//! Adds snapshots to a VMM that has a virtual machine, memory and vCPU of its own, created by
//! `applevisor`.
//!
//! Run `cargo run --package ramsnap-hvf-backend --features applevisor --example own_memory
//! [DIRECTORY]` on a Mac with Apple silicon. The workspace's cargo runner signs the program with
//! the entitlement that the hypervisor requires.

#[cfg(hvf_fake)]
use fake_hvf as _;

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod snapshots {
    #![allow(unsafe_code)]

    use std::error::Error;
    use std::path::Path;
    use std::ptr::NonNull;
    use std::sync::Arc;

    use applevisor::memory::Memory;
    use applevisor::vcpu::Vcpu;
    use dirty_bitmap::Policy;
    use hvf_backend::{
        Exit, ExitAction, GuestRam, PAGE_SIZE, Stage2, Stage2Tracker, VcpuState, Vm, fault_costs,
    };
    use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
    use page_reader::RamLayout;

    /// Tracks the writes to the memory, which the VMM has mapped into its guest.
    ///
    /// # Safety
    /// The memory stays mapped while the tracker exists, and the VMM accesses it by pointers only.
    pub(crate) unsafe fn track(
        vm: &Vm,
        memory: &Memory,
    ) -> Result<Stage2Tracker<Stage2>, Box<dyn Error>> {
        let start = memory.guest_addr().ok_or("map the memory first")?;
        let layout = RamLayout::single(start, memory.size() as u64)?;
        let host = NonNull::new(memory.host_addr()).ok_or("the memory has an address")?;
        // SAFETY: the caller upholds that the memory stays mapped.
        let ram = unsafe { GuestRam::options().adopt(layout, &[host]) }?;
        ram.mark_all(); // the first save is a full one
        // SAFETY: the VMM has mapped the memory into the guest.
        let stage2 = unsafe { Stage2::adopt(vm, &Arc::new(ram)) }?;
        Ok(stage2.track(Policy::Cost(fault_costs(PAGE_SIZE)))?)
    }

    /// Runs the vCPU until an exit that the VMM handles.
    pub(crate) fn run(vcpu: &Vcpu, tracker: &Stage2Tracker<Stage2>) -> Result<(), Box<dyn Error>> {
        loop {
            let run_guard = tracker.enter();
            vcpu.run()?;
            let exit = Exit::from(vcpu.get_exit_info());
            if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Forward {
                return Ok(()); // a timer, a device, a hypercall, or a request of another thread
            }
        }
    }

    /// Saves the memory of the stopped guest, all of it or what changed since the image `parent`,
    /// and the state of its vCPU.
    pub(crate) fn save(
        tracker: &Stage2Tracker<Stage2>,
        vcpu: &VcpuState,
        dest: &Path,
        parent: Option<ImageId>,
    ) -> Result<ImageId, Box<dyn Error>> {
        let epoch = tracker.checkpoint()?; // an error from here on restores the marks
        let ram = tracker.protection().ram();
        let seal = parent.map_or(Seal::new(), |parent| Seal::new().parent(parent));
        let options = MemoryWriter::options().layout(Layout::Packed).seal(seal);
        let mut writer = options.open(dest, ram.layout().ram_size(), PAGE_SIZE)?;
        let id = writer.image_id().ok_or("a packed image has an id")?;
        writer.set_metadata(vcpu.to_bytes())?;
        match parent {
            None => writer.write_full(ram)?,
            Some(_) => drop(writer.write_diff(ram, epoch.bitmap())?),
        }
        writer.commit_and_release(epoch)?;
        Ok(id)
    }
}

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
#[allow(unsafe_code)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use applevisor::memory::MemPerms;
    use applevisor::vcpu::Reg;
    use applevisor::vm::VirtualMachine;
    use hvf_backend::{VcpuState, Vm};

    const RAM: u64 = 0x8000_0000;
    /// Stores x0 at x1, and exits.
    const CODE: [u32; 2] = [
        0xf900_0020, // str x0, [x1]
        0xd400_0002, // hvc #0
    ];

    let dir = std::path::PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| ".".into()));
    let machine = VirtualMachine::new()?;
    let mut memory = machine.memory_create(16 << 20)?;
    memory.map(RAM, MemPerms::ReadWriteExec)?;
    for (address, code) in (RAM..).step_by(4).zip(CODE) {
        memory.write_u32(address, code)?;
    }
    let vcpu = machine.vcpu_create()?;
    vcpu.set_reg(Reg::CPSR, 0x3c5)?; // exception level 1, interrupts masked

    let vm = Vm::options().adopt_applevisor(&machine)?;
    let adopted = vm.adopt_applevisor_vcpu(&vcpu, 0)?;
    // SAFETY: `memory` is dropped after the tracker.
    let tracker = unsafe { snapshots::track(&vm, &memory) }?;
    let mut parent = None;
    for number in 0..4 {
        let dest = dir.join(format!("{number}.mem"));
        let state = VcpuState::capture(&adopted)?;
        parent = Some(snapshots::save(&tracker, &state, &dest, parent)?);
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
