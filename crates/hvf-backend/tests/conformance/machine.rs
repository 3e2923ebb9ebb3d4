//! Guests with real write faults, each with a tracker, for the conformance suite.

#![allow(unreachable_pub)]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
mod protection;
mod threads;

use std::io;
use std::sync::Arc;

use dirty_bitmap::{Policy, TrackedBitmap};
use hvf_backend::{Answer, Exception, Exit, Stage2Tracker};
use page_reader::{PageReader, RamLayout};
use test_machine::Need;
use write_faults::FaultHandler;

pub use protection::Protection;

/// The RAM has two regions, and a 2 MiB block of the memory file contains parts of both.
pub const LOW_SIZE: u64 = 3 << 20;
pub const HIGH: u64 = 4 << 30;
pub const HIGH_SIZE: u64 = 2 << 20;

/// The end of the programs and tables of those guests that have them.
const PROGRAM_END: u64 = 0x20000;

pub type Tracker = Stage2Tracker<Protection>;

/// The kind of a guest, and the way its writes are made to fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Threads of this process, with `mprotect`.
    Mprotect,
    /// Threads of this process, with userfaultfd.
    Userfaultfd,
    /// KVM vCPUs, with userfaultfd.
    KvmUserfaultfd,
    /// A KVM vCPU, with read-only memory slots.
    KvmReadOnly,
}

/// A guest that increments words. Each vCPU has its own word in every page.
pub struct Machine {
    // The order of the fields is the order of dropping: the vCPUs before the handler of their
    // faults.
    guest: Box<dyn Guest>,
    _handler: Option<FaultHandler>,
    wait_until_handled: Box<dyn Fn() + Send + Sync>,
    pub tracker: Arc<Tracker>,
    pub ram: Arc<dyn PageReader + Send + Sync>,
}

trait Guest: Send + Sync {
    fn vcpus(&self) -> usize;

    /// Makes a vCPU increment the word at each of these guest-physical addresses, on the calling
    /// thread.
    fn increment(&self, tracker: &Tracker, vcpu: usize, addresses: &[u64]);

    /// Writes as the host does, without a fault.
    fn host_write(&self, layout: &RamLayout, guest_start: u64, bytes: &[u8]);
}

impl Machine {
    /// Creates a machine of this kind. Returns `None` if this system does not support it, and
    /// reports that for `test`.
    pub fn new(kind: Kind, page_size: u64, policy: Policy, test: &str) -> Option<Self> {
        match kind {
            Kind::Mprotect => Some(threads::by_mprotect(page_size, policy)),
            #[cfg(target_os = "linux")]
            Kind::Userfaultfd => {
                let supported = Need::Userfaultfd.met(test);
                supported.then(|| threads::by_userfaultfd(page_size, policy))
            }
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Kind::KvmUserfaultfd => {
                let supported = Need::Kvm.met(test) && Need::Userfaultfd.met(test);
                supported.then(|| kvm::by_userfaultfd(page_size, policy))
            }
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Kind::KvmReadOnly => {
                let supported = Need::Kvm.met(test);
                supported.then(|| kvm::by_read_only_slots(page_size, policy))
            }
            #[allow(unreachable_patterns)]
            Kind::Userfaultfd => Need::Userfaultfd.met(test).then(|| unreachable!()),
            #[allow(unreachable_patterns)]
            _ => Need::Kvm.met(test).then(|| unreachable!()),
        }
    }

    pub fn layout(&self) -> &RamLayout {
        self.tracker.layout()
    }

    pub fn bitmap(&self) -> &TrackedBitmap {
        self.tracker.bitmap()
    }

    pub fn vcpus(&self) -> usize {
        self.guest.vcpus()
    }

    /// Returns the guest-physical address of each page that vCPUs may write.
    pub fn pages(&self) -> Vec<u64> {
        let page_size = self.bitmap().page_size() as usize;
        let pages = self.layout().regions().iter().flat_map(|region| {
            (region.guest_start.max(PROGRAM_END)..region.guest_end()).step_by(page_size)
        });
        pages.collect()
    }

    /// Makes a vCPU increment its word in each page.
    pub fn write_pages(&self, vcpu: usize, pages: impl IntoIterator<Item = u64>) {
        let words: Vec<_> = pages
            .into_iter()
            .map(|page| page + 8 * vcpu as u64)
            .collect();
        self.guest.increment(&self.tracker, vcpu, &words);
    }

    /// Waits until all resumed writes are marked. With userfaultfd, unprotecting a page wakes the
    /// writer before the page is marked.
    pub fn wait_until_marked(&self) {
        (self.wait_until_handled)();
    }

    /// Writes as the host does, and marks the pages.
    pub fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        self.guest.host_write(self.layout(), guest_start, bytes);
        let marked = self
            .tracker
            .mark_host_write(guest_start, bytes.len() as u64);
        marked.unwrap();
    }

    /// Returns the contents of the RAM.
    pub fn image(&self) -> Vec<u8> {
        let mut image = vec![0; self.layout().ram_size() as usize];
        self.ram.read_at(0, &mut image).unwrap();
        image
    }

    pub fn offset_of(&self, guest_address: u64) -> u64 {
        self.layout().offset_of(guest_address).unwrap()
    }

    pub fn is_dirty(&self, guest_address: u64) -> bool {
        let offset = self.offset_of(guest_address);
        self.bitmap().is_dirty(offset).unwrap()
    }
}

/// Returns the exit of a store to a protected page on Arm: a data abort with WnR and without ISV,
/// for a permission fault.
pub fn store_fault(physical_address: u64) -> Exit {
    Exit::Exception(Exception {
        syndrome: 0x9200_004f,
        physical_address,
        ..Exception::default()
    })
}

/// Passes a fault at an offset of the memory file to the tracker.
fn handle_fault(tracker: &Tracker, offset: u64) -> io::Result<()> {
    let address = tracker.layout().guest_address_of(offset);
    let exit = store_fault(address.ok_or(io::ErrorKind::InvalidInput)?);
    match tracker.handle_exit(&tracker.enter(), &exit) {
        Ok(Answer::Handled) => Ok(()),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

fn new_tracker(
    regions: [(u64, u64); 2],
    page_size: u64,
    policy: Policy,
    protection: Protection,
) -> Arc<Tracker> {
    let layout = RamLayout::new(regions).unwrap();
    let bitmap = Arc::new(TrackedBitmap::tracked(0, layout.ram_size(), page_size).unwrap());
    Arc::new(Stage2Tracker::new(layout, &bitmap, policy, protection).unwrap())
}
