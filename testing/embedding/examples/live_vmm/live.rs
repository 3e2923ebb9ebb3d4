//! What a VMM adds for live snapshots.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_backend::kvm_ioctls::VmFd;
use kvm_backend::{GuestRam, Vcpu, VcpuState};
use live_snapshot::{CancelToken, LiveError, LiveSnapshot, ParentImage, Report, UffdTracker};
use memory_image::{Chain, ImageId};
use memory_writer::{Layout, MemoryWriter, Seal};

use super::guest::{AnyError, Guest, PAGE};

/// A snapshot that is written in the background.
pub(crate) struct Writing {
    pub(crate) id: Option<ImageId>,
    pub(crate) thread: JoinHandle<Result<Report, LiveError>>,
}

/// Takes a snapshot of the running guest: a diff on top of the image `parent`, or a full one.
pub(crate) fn snapshot(
    guest: &Guest,
    tracker: &Arc<UffdTracker>,
    to: &Path,
    parent: Option<ImageId>,
    cancel: &CancelToken,
) -> Result<Writing, AnyError> {
    let seal = parent.into_iter().fold(Seal::new(), Seal::parent);
    let options = MemoryWriter::options().layout(Layout::Packed).seal(seal);
    let writer = options.open(to, guest.ram.layout().ram_size(), PAGE)?;
    let id = writer.image_id();
    let options = LiveSnapshot::options().diff(parent.is_some());
    let live = options.cancel(cancel.clone()).begin(tracker, writer)?; // the guest runs

    let paused = guest.pause()?; // vCPUs, and devices
    let state = guest.capture(&paused);
    let frozen = live.freeze();
    drop(paused);
    guest.resume(); // also after an error

    let mut frozen = frozen?;
    frozen.set_metadata(state?.to_bytes())?;
    let thread = thread::spawn(move || frozen.commit()); // the guest runs
    Ok(Writing { id, thread })
}

/// Restores the newest of these images into a new virtual machine that does not run yet, and tracks
/// its writes from there on: the next snapshot may be a diff on top of it.
pub(crate) fn restore(
    images: &[PathBuf],
    (vm, vcpu, ram): (&VmFd, &Vcpu, &Arc<GuestRam>),
) -> Result<(Arc<UffdTracker>, Option<ImageId>), AnyError> {
    let chain = Chain::open_sealed(images)?;
    chain.restore_zeroed(&mut &***ram)?;
    let state = VcpuState::from_bytes(chain.metadata().ok_or("no state of the vCPU")?)?;
    let _ = state.restore(vm, vcpu)?;
    let tracker = Arc::new(UffdTracker::start(ram)?);
    tracker.set_baseline(ParentImage::of_image(chain.id().map(ImageId::to_bytes)))?;
    Ok((tracker, chain.id()))
}
