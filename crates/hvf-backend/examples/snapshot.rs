//! Runs a guest of a few instructions that writes its RAM, and saves a full image followed by a
//! diff.
//!
//! Run `cargo run --package ramsnap-hvf-backend --example snapshot [DIRECTORY]` on a Mac with Apple
//! silicon. The workspace's cargo runner signs the program with the entitlement that the hypervisor
//! requires.

#[cfg(hvf_fake)]
use fake_hvf as _;

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::path::PathBuf;
    use std::sync::Arc;

    use dirty_bitmap::Policy;
    use hvf_backend::el1::{self, Start};
    use hvf_backend::{Exit, ExitAction, GuestRam, Register, Stage2, Stage2Tracker, Vcpu, Vm};
    use memory_writer::{Layout, MemoryWriter, Seal};
    use page_reader::{PageReader, RamLayout};

    const RAM: u64 = 0x8000_0000;
    const SIZE: u64 = 64 << 20;
    const PAGE: u64 = hvf_backend::PAGE_SIZE;
    const TABLE: u64 = RAM;
    const PROGRAM: u64 = RAM + PAGE;
    const DATA: u64 = RAM + (1 << 20);

    /// Stores x0 at x1, then continues with the next page and number until x0 equals x3.
    const CODE: [u32; 7] = [
        0xf900_0020, // loop: str x0, [x1]
        0x8b02_0021, //       add x1, x1, x2
        0x9100_0400, //       add x0, x0, #1
        0xeb03_001f, //       cmp x0, x3
        0x54ff_ff83, //       b.lo loop
        0xd400_0002, //       hvc #0
        0x17ff_fffa, //       b loop
    ];
    const HVC: u64 = 0x16;

    /// Runs the guest until its hypercall, and handles its write faults.
    fn run(
        vcpu: &mut Vcpu,
        tracker: &Stage2Tracker<Stage2>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        loop {
            let run_guard = tracker.enter();
            let exit = vcpu.run()?;
            if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Resume {
                continue;
            }
            drop(run_guard);
            return match exit {
                Exit::Exception(exception) if exception.syndrome >> 26 & 0x3f == HVC => Ok(()),
                exit => Err(format!("the guest stopped by {exit:x?}").into()),
            };
        }
    }

    let dir = PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| ".".into()));
    let vm = Vm::new()?;
    let layout = RamLayout::single(RAM, SIZE)?;
    let ram = Arc::new(GuestRam::new(layout)?);
    ram.write(TABLE, &el1::page_table())?;
    ram.write(PROGRAM, &CODE.map(u32::to_le_bytes).concat())?;
    let stage2 = Stage2::map(&vm, &ram)?;
    let tracker = stage2.track(Policy::default())?;

    let mut vcpu = vm.create_vcpu()?;
    let start = Start {
        entry: PROGRAM,
        page_table: TABLE,
        address_bits: 36,
    };
    let mut state = start.state();
    state.x[..4].copy_from_slice(&[1, DATA, PAGE, 101]); // pages 1 to 100
    let _ = state.restore(&vcpu, 0)?;
    run(&mut vcpu, &tracker)?;

    let epoch = tracker.checkpoint()?;
    let full = dir.join("guest.mem");
    let mut writer = MemoryWriter::options()
        .layout(Layout::Sealed)
        .open(&full, SIZE, PAGE)?;
    let parent = writer.image_id().ok_or("a sealed image has an id")?;
    writer.write_full(&ram)?;
    writer.commit_and_release(epoch)?;
    println!("{}: {} MiB", full.display(), SIZE >> 20);

    vcpu.set_register(Register::X3, 111)?; // ten more
    run(&mut vcpu, &tracker)?;

    let epoch = tracker.checkpoint()?;
    let diff = dir.join("guest-1.mem");
    // A packed image, because holes on macOS do not identify the pages of a raw diff.
    let mut writer = MemoryWriter::options()
        .layout(Layout::Packed)
        .seal(Seal::new().parent(parent))
        .open(&diff, SIZE, PAGE)?;
    let pages = writer.write_diff(&ram, epoch.bitmap())?;
    writer.commit_and_release(epoch)?;
    println!("{}: {pages} pages of 16 KiB", diff.display());

    let mut word = [0; 8];
    ram.read_at(DATA - RAM + 109 * PAGE, &mut word)?;
    println!("the last page holds {}", u64::from_le_bytes(word));
    Ok(())
}

#[cfg(not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)))]
fn main() {
    eprintln!(
        "this example needs macOS on Apple silicon; for KVM, see the documentation of kvm-backend"
    );
}
