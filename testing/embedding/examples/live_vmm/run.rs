//! Snapshots of a guest that are restored, and snapshots of the restored guest.

use std::sync::Arc;

use kvm_backend::kvm_ioctls::VcpuExit;
use kvm_backend::page_reader::RamLayout;
use kvm_backend::{GuestRam, RamSlots, VcpuState, Vcpus, create_vm, open_kvm};
use live_snapshot::{CancelToken, LiveSnapshot, LiveTracker, Method, UffdTracker};
use memory_image::Chain;
use memory_writer::{Layout, MemoryWriter, Seal};

use super::guest::{AnyError, Guest, PAGE, RAM, check};
use super::live;

/// Takes a full snapshot and two diffs of a running guest, restores them, and takes another diff of
/// the restored guest.
pub(crate) fn demo() -> Result<(), AnyError> {
    let kvm = match open_kvm() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("not run: {error}");
            return Ok(());
        }
    };
    let dir = tempfile::tempdir()?;
    let mut images: Vec<_> = ["full.mem", "d1.mem", "d2.mem"]
        .map(|name| dir.path().join(name))
        .into();
    let guest = Guest::start()?;
    let tracker = Arc::new(UffdTracker::start(&guest.ram)?);
    let (mut parent, cancel) = (None, CancelToken::new());
    for image in &images {
        let writing = live::snapshot(&guest, &tracker, image, parent, &cancel)?;
        let written = writing.thread.join();
        let report = written.map_err(|_| "the thread of the commit panicked")??;
        println!("{}: frozen in {:?}", image.display(), report.freeze);
        parent = writing.id;
    }
    // The tracker ends before the guest: a VMM drops it, or keeps it for the next snapshot.
    drop(tracker);
    drop(guest);

    let vm = create_vm(&kvm)?;
    let ram = Arc::new(GuestRam::new(RamLayout::single(0, RAM)?)?);
    let _slots = RamSlots::register(&vm, &ram, 0)?;
    let vcpus = Vcpus::new(&vm)?;
    let mut vcpu = vcpus.create(&vm, 0)?;
    let (tracker, newest) = live::restore(&images, (&vm, &vcpu, &ram))?;
    check_image(&images)?;
    assert_eq!(newest, parent);
    assert_eq!(
        tracker.bitmap().dirty_pages(),
        0,
        "the restore is the baseline"
    );

    // The program writes all of its pages, and exits once.
    match vcpu.run()? {
        VcpuExit::IoOut(0x80, _) => vcpu.complete_io(|_| ())?,
        other => return Err(format!("{other:?}").into()),
    }
    let msrs = kvm_backend::MsrList::query(&kvm)?;
    let state = VcpuState::capture(&msrs, &vcpus.pause()?, &vcpu)?;
    let seal = newest.into_iter().fold(Seal::new(), Seal::parent);
    images.push(dir.path().join("d3.mem"));
    let writer = MemoryWriter::options().layout(Layout::Packed).seal(seal);
    let writer = writer.open(&images[3], RAM, PAGE)?;
    let options = LiveSnapshot::options()
        .method(Method::CopyOnWrite)
        .diff(true);
    let mut frozen = options.begin(&tracker, writer)?.freeze()?;
    frozen.set_metadata(state.to_bytes())?;
    frozen.commit()?;
    check_image(&images)?;
    println!("the restored guest continues, and its diff extends the chain");
    Ok(())
}

/// Checks that the chain has the RAM of one moment, and the state of the vCPU at that moment.
fn check_image(images: &[std::path::PathBuf]) -> Result<(), AnyError> {
    let chain = Chain::open_sealed(images)?;
    let mut ram = vec![0; RAM as usize];
    chain.read(0, &mut ram)?;
    let state = VcpuState::from_bytes(chain.metadata().ok_or("no state of the vCPU")?)?;
    check(&ram, &state)
}
