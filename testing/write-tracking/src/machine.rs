//! A guest of a backend under the tracker.

use std::io;
use std::sync::{Arc, Barrier};
use std::thread;

use dirty_bitmap::{Policy, TakenBitmap, TrackedBitmap, TrackedEpoch};
use guest_ram::host_page_size;
use hvf_backend::{Stage2CheckpointError, Stage2Tracker};
use page_reader::{PageReader, RamLayout};
use write_faults::FaultHandler;

use crate::backend::{Backend, Tracker};
use crate::protection::Protection;

/// The end of the programs and tables of those guests that have them. The suite's pages are above.
pub(crate) const PROGRAM_END: u64 = 0x20000;

/// The error of a checkpoint.
pub(crate) type CheckpointError = Stage2CheckpointError<io::Error>;

/// A guest of a backend, and the tracker of its writes.
#[derive(Debug)]
pub struct Machine<B> {
    // The order of the fields is the order of dropping: the vCPUs before the handler of their
    // faults.
    backend: B,
    _handler: Option<FaultHandler>,
    pub(crate) tracker: Arc<Tracker>,
}

impl<B: Backend> Machine<B> {
    /// Creates a guest that is tracked in pages of `page_size` bytes, or in those of the host if
    /// these are larger.
    ///
    /// Returns `None` if the backend needs what this machine does not offer, and reports that for
    /// `test`.
    pub(crate) fn new(page_size: u64, policy: Policy, test: &str) -> Option<Self> {
        let test = format!("{}::{test}", std::any::type_name::<B>());
        if !B::NEEDS.iter().all(|need| need.met(&test)) {
            return None;
        }
        let page_size = page_size.max(host_page_size());
        let backend = B::new(page_size);
        let layout = RamLayout::new(B::REGIONS).expect("the regions are a layout");
        let bitmap = TrackedBitmap::tracked(0, layout.ram_size(), page_size);
        let bitmap = Arc::new(bitmap.expect("the RAM has a bitmap"));
        let protection = Protection::new(backend.protection());
        let tracker = Stage2Tracker::new(layout, &bitmap, policy, protection);
        let tracker = Arc::new(tracker.expect("the bitmap covers the RAM"));
        Some(Self {
            _handler: backend.serve_faults(&tracker),
            tracker,
            backend,
        })
    }

    pub(crate) fn layout(&self) -> &RamLayout {
        self.tracker.layout()
    }

    pub(crate) fn bitmap(&self) -> &TrackedBitmap {
        self.tracker.bitmap()
    }

    pub(crate) fn ram(&self) -> &(impl PageReader + Send + Sync) {
        self.backend.ram()
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn file(&self) -> &std::fs::File {
        self.backend.file()
    }

    pub(crate) fn vcpus(&self) -> usize {
        self.backend.vcpus()
    }

    /// Returns the guest-physical address of each page that vCPUs may write.
    pub(crate) fn pages(&self) -> Vec<u64> {
        let page_size = self.bitmap().page_size() as usize;
        let pages = self.layout().regions().iter().flat_map(|region| {
            (region.guest_start.max(PROGRAM_END)..region.guest_end()).step_by(page_size)
        });
        pages.collect()
    }

    /// Makes a vCPU increment its word in each page.
    pub(crate) fn write_pages(&self, vcpu: usize, pages: impl IntoIterator<Item = u64>) {
        let words: Vec<_> = pages
            .into_iter()
            .map(|page| page + 8 * vcpu as u64)
            .collect();
        self.backend.increment(&self.tracker, vcpu, &words);
    }

    /// Makes all vCPUs write concurrently, each to its own pages.
    pub(crate) fn all_write(&self, pages_of: impl Fn(usize) -> Vec<u64> + Sync) {
        let start = Barrier::new(self.vcpus());
        thread::scope(|scope| {
            for vcpu in 0..self.vcpus() {
                let (start, pages_of) = (&start, &pages_of);
                scope.spawn(move || {
                    start.wait();
                    self.write_pages(vcpu, pages_of(vcpu));
                });
            }
        });
        self.wait_until_marked();
    }

    /// Waits until all resumed writes are marked. With userfaultfd, unprotecting a page wakes the
    /// writer before the page is marked.
    pub(crate) fn wait_until_marked(&self) {
        self.backend.wait_until_handled();
    }

    /// Writes as the host does, and marks the pages.
    pub(crate) fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        self.backend.host_write(guest_start, bytes);
        let marked = self
            .tracker
            .mark_host_write(guest_start, bytes.len() as u64);
        marked.unwrap();
    }

    /// Makes a checkpoint of a stopped guest.
    pub(crate) fn checkpoint(&self) -> Result<TrackedEpoch, CheckpointError> {
        once_stopped(|| self.tracker.checkpoint())
    }

    /// Makes the last checkpoint of a save.
    pub(crate) fn checkpoint_final<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<&'e TakenBitmap, CheckpointError> {
        // Once the vCPUs have stopped, this is refused because a save is in progress.
        once_stopped(|| self.tracker.checkpoint()).unwrap_err();
        Ok(self.tracker.checkpoint_final(epoch)?.bitmap())
    }

    /// Returns the contents of the RAM.
    pub(crate) fn image(&self) -> Vec<u8> {
        let mut image = vec![0; self.layout().ram_size() as usize];
        self.ram().read_at(0, &mut image).unwrap();
        image
    }

    pub(crate) fn offset_of(&self, guest_address: u64) -> u64 {
        self.layout().offset_of(guest_address).unwrap()
    }

    pub(crate) fn is_dirty(&self, guest_address: u64) -> bool {
        let offset = self.offset_of(guest_address);
        self.bitmap().is_dirty(offset).unwrap()
    }
}

/// Repeats a checkpoint until no vCPU is running. With userfaultfd, a thread may still handle a
/// fault whose write was already resumed by the handling of another fault.
fn once_stopped<T>(
    mut checkpoint: impl FnMut() -> Result<T, CheckpointError>,
) -> Result<T, CheckpointError> {
    loop {
        match checkpoint() {
            Err(Stage2CheckpointError::VcpuRunning { .. }) => thread::yield_now(),
            end => return end,
        }
    }
}
