//! Guests whose writes really fault, each with a tracker: what the conformance suite runs on.

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
use test_machine::tracked::FaultHandler;

pub use protection::Protection;

/// Two regions, and a 2 MiB block of the memory file that has a part of both.
pub const LOW_SIZE: u64 = 3 << 20;
pub const HIGH: u64 = 4 << 30;
pub const HIGH_SIZE: u64 = 2 << 20;

/// Up to here, programs and tables of guests that have some.
const PROGRAM_END: u64 = 0x20000;

pub type Tracker = Stage2Tracker<Protection>;

/// What a guest is, and how its writes are made to fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Threads of this process, by `mprotect`.
    Mprotect,
    /// Threads of this process, by userfaultfd.
    Userfaultfd,
    /// vCPUs of KVM's, by userfaultfd.
    KvmUserfaultfd,
    /// A vCPU of KVM's, by read-only memory slots.
    KvmReadOnly,
}

/// A guest. It increments words; each vCPU has one of its own in every page.
pub struct Machine {
    // In the order of dropping: vCPUs, then who answers their faults.
    guest: Box<dyn Guest>,
    _handler: Option<FaultHandler>,
    answered: Box<dyn Fn() + Send + Sync>,
    pub tracker: Arc<Tracker>,
    pub ram: Arc<dyn PageReader + Send + Sync>,
}

trait Guest: Send + Sync {
    fn vcpus(&self) -> usize;

    /// Has a vCPU, on the calling thread, increment the word at each of these guest-physical addresses.
    fn increment(&self, tracker: &Tracker, vcpu: usize, addresses: &[u64]);

    /// Writes as a host does: without a fault.
    fn host_write(&self, layout: &RamLayout, guest_start: u64, bytes: &[u8]);
}

impl Machine {
    /// A machine of this kind, or `None` where there can be none, which is said for `test`.
    pub fn new(kind: Kind, page_size: u64, policy: Policy, test: &str) -> Option<Self> {
        match kind {
            Kind::Mprotect => Some(threads::by_mprotect(page_size, policy)),
            #[cfg(target_os = "linux")]
            Kind::Userfaultfd => {
                let here = Need::Userfaultfd.met(test);
                here.then(|| threads::by_userfaultfd(page_size, policy))
            }
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Kind::KvmUserfaultfd => {
                let here = Need::Kvm.met(test) && Need::Userfaultfd.met(test);
                here.then(|| kvm::by_userfaultfd(page_size, policy))
            }
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Kind::KvmReadOnly => {
                let here = Need::Kvm.met(test);
                here.then(|| kvm::by_read_only_slots(page_size, policy))
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

    /// The guest-physical address of each page that vCPUs may write.
    pub fn pages(&self) -> Vec<u64> {
        let page_size = self.bitmap().page_size() as usize;
        let pages = self.layout().regions().iter().flat_map(|region| {
            (region.guest_start.max(PROGRAM_END)..region.guest_end()).step_by(page_size)
        });
        pages.collect()
    }

    /// Has a vCPU increment its word of each page.
    pub fn write_pages(&self, vcpu: usize, pages: impl IntoIterator<Item = u64>) {
        let words: Vec<_> = pages
            .into_iter()
            .map(|page| page + 8 * vcpu as u64)
            .collect();
        self.guest.increment(&self.tracker, vcpu, &words);
    }

    /// Waits until writes that went on are marked: by userfaultfd, lifting wakes the writer, and
    /// marking comes after it.
    pub fn wait_until_marked(&self) {
        (self.answered)();
    }

    /// Writes as a host does, and marks.
    pub fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        self.guest.host_write(self.layout(), guest_start, bytes);
        let marked = self
            .tracker
            .mark_host_write(guest_start, bytes.len() as u64);
        marked.unwrap();
    }

    /// Everything that is in RAM.
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

/// What a store to a protected page looks like on Arm: a data abort, WnR, without ISV, a permission fault.
pub fn store_fault(physical_address: u64) -> Exit {
    Exit::Exception(Exception {
        syndrome: 0x9200_004f,
        physical_address,
        ..Exception::default()
    })
}

/// Tells the tracker of a fault at an offset of the memory file.
fn tell(tracker: &Tracker, offset: u64) -> io::Result<()> {
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
