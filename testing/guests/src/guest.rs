//! The interface of guests.

use std::fmt;
use std::io;
use std::sync::Arc;

use dirty_bitmap::{
    GeometryError, LoggedBitmap, LoggedEpoch, NotReleased, OutOfRange, Runs, TakenBitmap,
    TrackedBitmap, TrackedEpoch,
};
use page_reader::{HostMemory, PageReader, RamLayout};

use super::ledger::Verdict;

/// A guest with a ledger in its RAM: a virtual machine, or a part of this process.
///
/// A new guest has empty memory. It either [boots](Self::boot), or continues another guest: its
/// memory is [written](Self::write) from that guest's snapshots, and its
/// [processor](Self::set_processor) is set to that guest's state.
pub trait Guest: Send {
    /// Loads the program and puts the processor at its start.
    fn boot(&mut self) -> anyhow::Result<()>;

    /// Runs the guest until `step` steps are done. The guest then waits for the next command.
    fn work_until(&mut self, step: u64) -> anyhow::Result<()>;

    /// Runs the guest, and pauses it at an arbitrary instruction in the middle of a step. A guest
    /// that can be stopped only between steps does not run.
    fn pause(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// Returns the number of steps done.
    fn steps(&self) -> u64;

    /// Makes the guest check its own ledger.
    fn check(&mut self) -> anyhow::Result<Verdict>;

    /// Returns the guest's RAM, which is readable while the guest runs.
    fn ram(&self) -> Ram;

    /// Writes to the RAM of a guest that does not run, before its writes are tracked.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()>;

    /// Returns the offset into the RAM of the first byte after the hole in the guest's addresses,
    /// if they have one.
    fn gap(&self) -> Option<u64> {
        None
    }

    /// Starts tracking writes.
    fn track(&mut self) -> anyhow::Result<Arc<dyn Tracker>>;

    /// Returns the state of the processor of a [paused](Self::pause) guest.
    fn processor(&mut self) -> anyhow::Result<Vec<u8>>;

    /// Sets the processor to the state that [`processor`](Self::processor) returned for another
    /// guest.
    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()>;
}

/// A tracker of the pages that a guest writes. No write is missed, also while the guest runs. Drop
/// it only when the guest does not run.
pub trait Tracker: Send + Sync {
    /// Returns the pages written, by byte offset into the RAM.
    fn dirty(&self) -> Dirty<'_>;

    /// Begins a save: takes every page written so far, and tracks the next write to it again.
    fn begin(&self) -> anyhow::Result<Epoch>;

    /// Adds the pages written since to the save, tracks the next writes to them again, and returns
    /// these pages.
    fn extend<'e>(&self, epoch: &'e mut Epoch) -> anyhow::Result<&'e TakenBitmap>;
}

/// The pages that a guest wrote, for reading and marking. The method of tracking determines how
/// they are taken.
#[derive(Debug, Clone, Copy)]
pub enum Dirty<'a> {
    /// Found by a hypervisor's log.
    Logged(&'a LoggedBitmap),
    /// Found by write faults.
    Tracked(&'a TrackedBitmap),
}

/// Calls the same method of either bitmap.
macro_rules! of_either {
    ($dirty:expr, $bitmap:ident => $call:expr) => {
        match $dirty {
            Dirty::Logged($bitmap) => $call,
            Dirty::Tracked($bitmap) => $call,
        }
    };
}

impl<'a> Dirty<'a> {
    pub fn ram_size(self) -> u64 {
        of_either!(self, bitmap => bitmap.ram_size())
    }

    pub fn page_size(self) -> u64 {
        of_either!(self, bitmap => bitmap.page_size())
    }

    pub fn runs(self) -> Runs<'a> {
        of_either!(self, bitmap => bitmap.runs())
    }

    pub fn is_dirty(self, offset: u64) -> Result<bool, OutOfRange> {
        of_either!(self, bitmap => bitmap.is_dirty(offset))
    }

    pub fn mark_range(self, offset: u64, len: u64) -> Result<bool, OutOfRange> {
        of_either!(self, bitmap => bitmap.mark_range(offset, len))
    }

    pub fn rebuild(self, granule: u64) -> Result<(), GeometryError> {
        of_either!(self, bitmap => bitmap.rebuild(granule))
    }
}

/// The pages of one save. They become dirty again unless the save is released.
#[derive(Debug)]
pub enum Epoch {
    Logged(LoggedEpoch),
    Tracked(TrackedEpoch),
}

impl Epoch {
    pub fn bitmap(&self) -> &TakenBitmap {
        match self {
            Self::Logged(epoch) => epoch.bitmap(),
            Self::Tracked(epoch) => epoch.bitmap(),
        }
    }

    /// Ends the save: its pages are durable.
    pub fn release(self) -> Result<(), NotReleased> {
        match self {
            Self::Logged(epoch) => epoch.release(),
            Self::Tracked(epoch) => epoch.release(),
        }
    }

    /// Returns the epoch of a tracker that protects the pages it takes.
    pub fn tracked(&mut self) -> anyhow::Result<&mut TrackedEpoch> {
        match self {
            Self::Tracked(epoch) => Ok(epoch),
            Self::Logged(_) => anyhow::bail!("an epoch of another tracker"),
        }
    }
}

/// A guest's RAM, shared between the guest and its readers.
#[derive(Clone)]
pub struct Ram(Arc<dyn PageReader + Send + Sync>);

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").finish_non_exhaustive()
    }
}

impl Ram {
    pub fn new(ram: Arc<impl PageReader + Send + Sync + 'static>) -> Self {
        Self(ram)
    }
}

impl PageReader for Ram {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.0.host_memory(offset, len)
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.0.ram_layout()
    }
}
