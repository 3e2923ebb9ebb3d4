//! Guests for machines without a hypervisor: the ledger runs as a part of this process, on memory whose writes are tracked by
//! real page faults.

mod memory;
mod mprotect;
#[cfg(test)]
mod tests;
#[cfg(target_os = "linux")]
mod uffd;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use memory::Memory;
#[cfg(target_os = "linux")]
pub use uffd::open as open_userfaultfd;

use super::guest::{Epoch, Guest, Ram, Tracker};
use super::ledger::{self, Layout, Registers, Verdict, Words};

/// How writes are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    #[cfg(target_os = "linux")]
    Userfaultfd,
    Mprotect,
}

/// Makes writes to a memory fault, once a page, and marks the page then.
trait Guard: Send + Sync {
    /// Lets the next write to each page of `runs`, byte offsets, fault again.
    fn protect(&self, runs: &mut dyn Iterator<Item = Range<u64>>) -> io::Result<()>;
}

/// A guard and the marks that it sets.
struct Watch {
    guard: Box<dyn Guard>,
    dirty: Arc<DirtyBitmap>,
}

impl Tracker for Watch {
    fn dirty(&self) -> &Arc<DirtyBitmap> {
        &self.dirty
    }

    fn begin(&self) -> anyhow::Result<Epoch> {
        let epoch = Epoch::begin(Arc::clone(&self.dirty))?;
        self.guard.protect(&mut epoch.bitmap().runs())?;
        Ok(epoch)
    }

    fn take_more(&self, epoch: &mut Epoch) -> anyhow::Result<DirtyBitmap> {
        // First the marks, then the protection, and both before the copy: a write in between is in the copy, and a
        // later one faults.
        let more = epoch.take_more()?;
        self.guard.protect(&mut more.runs())?;
        Ok(more)
    }
}

/// A guest inside this process.
pub struct Embedded {
    tracking: Tracking,
    memory: Arc<Memory>,
    layout: Layout,
    registers: Registers,
}

/// The memory as the ledger sees it.
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
    /// A guest with empty memory.
    pub fn new(layout: Layout, tracking: Tracking) -> anyhow::Result<Self> {
        let memory = Memory::new(layout.ram).context("no memory for the guest")?;
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
        let bitmap = DirtyBitmap::new(0, self.layout.ram, memory::page_size()?)?;
        let (memory, dirty) = (Arc::clone(&self.memory), Arc::new(bitmap));
        let marks = Arc::clone(&dirty);
        let guard: Box<dyn Guard> = match self.tracking {
            #[cfg(target_os = "linux")]
            Tracking::Userfaultfd => Box::new(uffd::Userfaultfd::new(memory, marks)?),
            Tracking::Mprotect => Box::new(mprotect::Mprotect::new(memory, marks)?),
        };
        Ok(Arc::new(Watch { guard, dirty }))
    }

    fn processor(&mut self) -> anyhow::Result<Vec<u8>> {
        Ok(postcard::to_stdvec(&self.registers)?)
    }

    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()> {
        self.registers = postcard::from_bytes(state).context("not the state of this processor")?;
        Ok(())
    }
}
