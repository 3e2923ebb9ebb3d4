//! Guests for hosts without a hypervisor. The ledger runs as a part of this process, on memory
//! whose writes are tracked by real page faults.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use anyhow::Context;
use dirty_bitmap::{Policy, TakenBitmap, TrackedBitmap, WriteTracker};
#[cfg(target_os = "linux")]
use write_faults::Userfaultfd;
use write_faults::{FaultHandler, Memory, Mprotect, PageFaults, page_size};

use super::guest::{Dirty, Epoch, Guest, Ram, Tracker};
use super::ledger::{self, Layout, Registers, Verdict, Words};

/// The method of tracking writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    #[cfg(target_os = "linux")]
    Userfaultfd,
    Mprotect,
}

/// A write tracker, and the page protection whose faults it handles.
#[derive(Debug)]
pub struct Watch<P> {
    tracker: Arc<WriteTracker>,
    protection: P,
    _handler: FaultHandler,
}

impl<P: PageFaults> Watch<P> {
    /// Protects the first `ram` bytes, in pages of `page` bytes.
    pub fn new(ram: u64, page: u64, policy: Policy, protection: P) -> anyhow::Result<Self> {
        let bitmap = TrackedBitmap::tracked(0, ram, page)?;
        let tracker = Arc::new(WriteTracker::new(Arc::new(bitmap), policy)?);
        let handler = protection.answer({
            let (tracker, protection) = (Arc::clone(&tracker), protection.clone());
            move |offset| {
                let unprotected = tracker.on_write_fault(offset, &protection);
                unprotected.map(drop).map_err(io::Error::other)
            }
        })?;
        // Clear the marks: the first snapshot is a full one, so no diff needs the earlier writes.
        tracker.checkpoint(&protection)?.release()?;
        Ok(Self {
            tracker,
            protection,
            _handler: handler,
        })
    }
}

impl<P: PageFaults> Tracker for Watch<P> {
    fn dirty(&self) -> Dirty<'_> {
        Dirty::Tracked(self.tracker.bitmap())
    }

    fn begin(&self) -> anyhow::Result<Epoch> {
        Ok(Epoch::Tracked(self.tracker.checkpoint(&self.protection)?))
    }

    fn extend<'e>(&self, epoch: &'e mut Epoch) -> anyhow::Result<&'e TakenBitmap> {
        let epoch = epoch.tracked()?;
        let more = self
            .tracker
            .checkpoint_incremental(epoch, &self.protection)?;
        Ok(more.bitmap())
    }
}

/// A guest inside this process.
#[derive(Debug)]
pub struct Embedded {
    tracking: Tracking,
    memory: Arc<Memory>,
    layout: Layout,
    registers: Registers,
}

/// The ledger's access to the memory.
struct Access<'a>(&'a Memory);

impl Words for Access<'_> {
    fn load(&self, offset: u64) -> u64 {
        self.0.load(offset)
    }

    fn store(&mut self, offset: u64, word: u64) {
        self.0.store(offset, word);
    }
}

impl Embedded {
    /// Creates a guest with empty memory.
    pub fn new(layout: Layout, tracking: Tracking) -> anyhow::Result<Self> {
        let memory = Memory::new(layout.ram).context("failed to map the memory of the guest")?;
        Ok(Self {
            tracking,
            memory: Arc::new(memory),
            layout,
            registers: Registers::default(),
        })
    }
}

impl Guest for Embedded {
    fn boot(&mut self) -> anyhow::Result<()> {
        ledger::prepare(&mut Access(&self.memory), self.layout);
        Ok(())
    }

    fn ram(&self) -> Ram {
        Ram::new(Arc::clone(&self.memory))
    }

    fn work_until(&mut self, step: u64) -> anyhow::Result<()> {
        while self.registers.step < step {
            ledger::step(&mut Access(&self.memory), self.layout, &mut self.registers);
        }
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<Verdict> {
        Ok(ledger::check(
            &mut Access(&self.memory),
            self.layout,
            self.registers,
        ))
    }

    fn steps(&self) -> u64 {
        self.registers.step
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.memory.write(offset, bytes);
        Ok(())
    }

    fn track(&mut self) -> anyhow::Result<Arc<dyn Tracker>> {
        let (ram, page, policy) = (self.layout.ram, page_size()?, Policy::Pages);
        Ok(match self.tracking {
            #[cfg(target_os = "linux")]
            Tracking::Userfaultfd => {
                let protection = Userfaultfd::new(&self.memory, ram, 1)?;
                Arc::new(Watch::new(ram, page, policy, protection)?)
            }
            Tracking::Mprotect => {
                let protection = Mprotect::new(&self.memory);
                Arc::new(Watch::new(ram, page, policy, protection)?)
            }
        })
    }

    fn processor(&mut self) -> anyhow::Result<Vec<u8>> {
        Ok(postcard::to_stdvec(&self.registers)?)
    }

    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()> {
        self.registers = postcard::from_bytes(state).context("not the state of this processor")?;
        Ok(())
    }
}
