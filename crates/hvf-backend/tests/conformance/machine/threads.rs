//! Guests in this process, whose threads are the vCPUs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dirty_bitmap::Policy;
use page_reader::RamLayout;
#[cfg(target_os = "linux")]
use write_faults::Userfaultfd;
use write_faults::{Memory, Mprotect, PageFaults, page_size as host_page_size};

use super::{
    Guest, HIGH, HIGH_SIZE, LOW_SIZE, Machine, Protection, Tracker, handle_fault, new_tracker,
};

struct Threads {
    memory: Arc<Memory>,
    file: File,
}

pub(super) fn by_mprotect(page_size: u64, policy: Policy) -> Machine {
    let guest = Threads::new();
    let protection = Mprotect::new(&guest.memory);
    guest.tracked_by(protection, page_size, policy)
}

#[cfg(target_os = "linux")]
pub(super) fn by_userfaultfd(page_size: u64, policy: Policy) -> Machine {
    let guest = Threads::new();
    let protection = Userfaultfd::new(&guest.memory, LOW_SIZE + HIGH_SIZE, 3).unwrap();
    guest.tracked_by(protection, page_size, policy)
}

impl Threads {
    fn new() -> Self {
        let (memory, file) = Memory::shared(LOW_SIZE + HIGH_SIZE).unwrap();
        Self {
            memory: Arc::new(memory),
            file,
        }
    }

    fn tracked_by(self, protection: impl PageFaults, page_size: u64, policy: Policy) -> Machine {
        // At least the page size of the host, which is the smallest unit of protection.
        let page_size = page_size.max(host_page_size().unwrap());
        let regions = [(0, LOW_SIZE), (HIGH, HIGH_SIZE)];
        let by = Protection::new(protection.clone());
        let tracker = new_tracker(regions, page_size, policy, by);
        let of_handler = Arc::clone(&tracker);
        let handler = protection.answer(move |offset| handle_fault(&of_handler, offset));
        Machine {
            _handler: Some(handler.unwrap()),
            wait_until_handled: Box::new(move || protection.wait_until_answered()),
            tracker,
            ram: Arc::clone(&self.memory) as _,
            guest: Box::new(self),
        }
    }
}

impl Guest for Threads {
    fn vcpus(&self) -> usize {
        8
    }

    fn increment(&self, tracker: &Tracker, _vcpu: usize, addresses: &[u64]) {
        let _in_guest = tracker.enter();
        for address in addresses {
            let offset = tracker.layout().offset_of(*address).unwrap();
            self.memory.store(offset, self.memory.load(offset) + 1);
        }
    }

    fn host_write(&self, layout: &RamLayout, guest_start: u64, bytes: &[u8]) {
        let offset = layout.offset_of(guest_start).unwrap();
        self.file.write_all_at(bytes, offset).unwrap();
    }
}
