//! Guests in this process, whose threads are the vCPUs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use page_reader::{PageReader, RamLayout};
use test_machine::Need;
#[cfg(target_os = "linux")]
use write_faults::Userfaultfd;
use write_faults::{FaultHandler, Memory, Mprotect, PageFaults};
use write_tracking::{Backend, HIGH_SIZE, LOW_SIZE, Tracker, handle_fault};

/// A guest whose memory is protected by `P`.
pub(super) struct Threads<P> {
    memory: Arc<Memory>,
    file: File,
    layout: RamLayout,
    protection: P,
}

/// A protection of memory of this process.
pub(super) trait Protects: PageFaults {
    const NEEDS: &'static [Need];
    const LATE_FAULTS: bool;

    fn of(memory: &Arc<Memory>) -> Self;
}

/// The signal handler runs on the thread that writes.
impl Protects for Mprotect {
    const NEEDS: &'static [Need] = &[];
    const LATE_FAULTS: bool = false;

    fn of(memory: &Arc<Memory>) -> Self {
        Self::new(memory)
    }
}

#[cfg(target_os = "linux")]
impl Protects for Userfaultfd {
    const NEEDS: &'static [Need] = &[Need::Userfaultfd];
    const LATE_FAULTS: bool = true;

    fn of(memory: &Arc<Memory>) -> Self {
        Self::new(memory, LOW_SIZE + HIGH_SIZE, 3).unwrap()
    }
}

impl<P: Protects> Backend for Threads<P> {
    type Protection = P;

    const NEEDS: &'static [Need] = P::NEEDS;
    const LATE_FAULTS: bool = P::LATE_FAULTS;

    fn new(_page_size: u64) -> Self {
        let (memory, file) = Memory::shared(LOW_SIZE + HIGH_SIZE).unwrap();
        let memory = Arc::new(memory);
        Self {
            protection: P::of(&memory),
            memory,
            file,
            layout: RamLayout::new(Self::REGIONS).unwrap(),
        }
    }

    fn protection(&self) -> P {
        self.protection.clone()
    }

    fn serve_faults(&self, tracker: &Arc<Tracker>) -> Option<FaultHandler> {
        let tracker = Arc::clone(tracker);
        let handler = self
            .protection
            .answer(move |offset| handle_fault(&tracker, offset));
        Some(handler.unwrap())
    }

    fn wait_until_handled(&self) {
        self.protection.wait_until_answered();
    }

    fn ram(&self) -> &(impl PageReader + Send + Sync) {
        &*self.memory
    }

    fn vcpus(&self) -> usize {
        8
    }

    fn increment(&self, tracker: &Tracker, _vcpu: usize, addresses: &[u64]) {
        let _running = tracker.enter();
        for address in addresses {
            let offset = self.layout.offset_of(*address).unwrap();
            self.memory.store(offset, self.memory.load(offset) + 1);
        }
    }

    fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        let offset = self.layout.offset_of(guest_start).unwrap();
        self.file.write_all_at(bytes, offset).unwrap();
    }

    fn file(&self) -> &File {
        &self.file
    }
}
