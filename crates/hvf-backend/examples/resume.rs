//! Starts the guest of the example `snapshot` from its images, without reading them first, and
//! saves what it has written as the next diff.
//!
//! Run `cargo run --package ramsnap-hvf-backend --example resume DIRECTORY` on a Mac with Apple
//! silicon, with the directory of the example `snapshot`.

#[cfg(hvf_fake)]
use fake_hvf as _;

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::path::PathBuf;
    use std::sync::Arc;

    use dirty_bitmap::Policy;
    use hvf_backend::el1::Start;
    use hvf_backend::{ExitAction, PAGE_SIZE, Stage2, Vm};
    use memory_image::{Chain, MappedChain};
    use memory_writer::{Layout, MemoryWriter, Seal};
    use page_reader::RamLayout;

    const RAM: u64 = 0x8000_0000;

    let dir = PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| ".".into()));
    let images = ["guest.mem", "guest-1.mem"].map(|name| dir.join(name));
    let chain = Chain::open_sealed(&images)?;
    let parent = chain.id().ok_or("a sealed image has an id")?;
    let image = MappedChain::open(&chain)?;
    let size = image.ram_size();

    // The host reads a page of the images when it is touched. The tracker is active: the pages
    // that the guest writes from now on are the next diff.
    let vm = Vm::new()?;
    let layout = RamLayout::single(RAM, size)?;
    let tracker = Stage2::start(&vm, layout, image, Policy::default())?;
    let ram = Arc::clone(tracker.protection().ram());

    // A VMM restores the `VcpuState` that it has saved beside the images.
    let mut vcpu = vm.create_vcpu()?;
    let start = Start {
        entry: RAM + PAGE_SIZE,
        page_table: RAM,
        address_bits: 36,
    };
    let mut state = start.state();
    state.x[..4].copy_from_slice(&[7, RAM + (32 << 20), PAGE_SIZE, 12]); // five pages
    let _ = state.restore(&vcpu, 0)?;
    loop {
        let run_guard = tracker.enter();
        let exit = vcpu.run()?;
        if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Forward {
            break;
        }
    }

    let epoch = tracker.checkpoint()?;
    let diff = dir.join("guest-2.mem");
    let mut writer = MemoryWriter::options()
        .layout(Layout::Packed)
        .seal(Seal::new().parent(parent))
        .open(&diff, size, PAGE_SIZE)?;
    let pages = writer.write_diff(&ram, epoch.bitmap())?;
    writer.commit_and_release(epoch)?;
    println!("{}: {pages} pages of 16 KiB", diff.display());
    Ok(())
}

#[cfg(not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)))]
fn main() {
    eprintln!("this example needs macOS on Apple silicon");
}
