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

use super::guest::{Guest, Ram};
use super::ledger::{self, Layout, Registers, Verdict, Words};

/// How writes are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    #[cfg(target_os = "linux")]
    Userfaultfd,
    Mprotect,
}

/// Makes writes to a memory fault, once a page.
trait Tracker: Send {
    /// Lets the next write to each page of `runs`, byte offsets, fault again.
    fn protect(&self, runs: &mut dyn Iterator<Item = Range<u64>>) -> io::Result<()>;
}

/// A guest inside this process.
pub struct Embedded {
    // The tracker goes first: it unprotects the memory.
    tracker: Option<Box<dyn Tracker>>,
    tracking: Tracking,
    memory: Arc<Memory>,
    dirty: Arc<DirtyBitmap>,
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
            tracker: None,
            tracking,
            memory: Arc::new(memory),
            dirty: Arc::new(DirtyBitmap::new(0, layout.ram, memory::page_size()?)?),
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

    fn dirty(&self) -> &Arc<DirtyBitmap> {
        &self.dirty
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

    fn track(&mut self) -> anyhow::Result<()> {
        let (memory, dirty) = (Arc::clone(&self.memory), Arc::clone(&self.dirty));
        self.tracker = Some(match self.tracking {
            #[cfg(target_os = "linux")]
            Tracking::Userfaultfd => Box::new(uffd::Userfaultfd::new(memory, dirty)?),
            Tracking::Mprotect => Box::new(mprotect::Mprotect::new(memory, dirty)?),
        });
        Ok(())
    }

    fn harvest(&mut self) -> anyhow::Result<()> {
        // The marks are in the bitmap since the faults; what is left is to have the next writes fault again.
        if let Some(tracker) = &self.tracker {
            tracker.protect(&mut self.dirty.runs())?;
        }
        Ok(())
    }

    fn processor(&mut self) -> anyhow::Result<Vec<u8>> {
        Ok(postcard::to_stdvec(&self.registers)?)
    }

    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()> {
        self.registers = postcard::from_bytes(state).context("not the state of this processor")?;
        Ok(())
    }
}
