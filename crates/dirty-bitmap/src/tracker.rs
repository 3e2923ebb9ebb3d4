//! Tracking by write faults: what each opens, what is protected again, and in which order.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use thiserror::Error;

use crate::bitmap::{TakenBitmap, TrackedBitmap};
use crate::blocks::{BLOCK_SIZE, Blocks, Opening};
use crate::epoch::{BeginEpochError, Epoch, EpochCommitting, TakeMoreError, TrackedEpoch};
use crate::geometry::{GeometryError, OutOfRange};
use crate::policy::Policy;
use crate::protection::WriteProtection;
use crate::runs::Runs;

/// Clean pages between two runs that are protected along with them, in place of a second call. They are protected already, so
/// this changes nothing but the time: walking them takes as long as one call.
const BRIDGED_PAGES: u64 = 16;

/// Knows what a guest writes by write-protecting its memory, and opens as much at a fault as pays.
///
/// Where writes are noticed by faults (Apple's Hypervisor framework, userfaultfd, `mprotect`), granularity decides everything: opened page by page,
/// the guest waits for every page it writes; opened in large blocks, a diff writes what is clean. So every block of
/// [2 MiB](crate::BLOCK_SIZE) goes its own way, by its [`Policy`], and changes it at any checkpoint.
///
/// Marks never move for that. The bitmap has a bit for each page all the time; a fault marks *just what it opened*, one page or 512. A choice that a
/// concurrent checkpoint has overtaken is a worse choice, never a lost page.
///
/// # Order
/// A fault is answered by lifting the protection, *then* marking, *then* letting the vCPU go on
/// ([`on_write_fault`](Self::on_write_fault), and its caller). A checkpoint takes the marks, *then* protects what they cover
/// ([`arm`](Self::arm)), *then* the pages are copied. Either the checkpoint sees the mark and its protection makes the next write
/// fault again, or it does not, and the mark stays for the next. (Marking first loses a page: see
/// [`DirtyBitmap`](crate::DirtyBitmap#mark-last).)
///
/// The types keep this order. The bitmap is a [`TrackedBitmap`], which others mark and read. Its marks are taken by the tracker
/// alone, and it has one tracker at a time.
/// ```compile_fail,E0599
/// # fn example(tracker: &dirty_bitmap::WriteTracker) {
/// tracker.bitmap().drain();
/// # }
/// ```
/// ```compile_fail,E0599
/// # fn example(tracker: &dirty_bitmap::WriteTracker) {
/// tracker.bitmap().begin_epoch();
/// # }
/// ```
///
/// All calls may come from all threads at once, also while the bitmap is [rebuilt](crate::DirtyBitmap::rebuild).
///
/// # Memory
/// 16 bytes for each 2 MiB of RAM, beside the bitmap.
///
/// # Examples
/// ```
/// use std::{convert::Infallible, ops::Range, sync::Arc};
///
/// use dirty_bitmap::{Policy, TakenBitmap, TrackedBitmap, WriteProtection, WriteTracker};
///
/// struct Stage2; // of a hypervisor
/// impl WriteProtection for Stage2 {
///     type Error = Infallible;
///     fn protect(&self, range: Range<u64>) -> Result<(), Infallible> { Ok(()) }
///     fn lift(&self, range: Range<u64>) -> Result<(), Infallible> { Ok(()) }
/// }
/// # fn write_full() -> std::io::Result<()> { Ok(()) }
/// # fn write_diff(_: &TakenBitmap) -> std::io::Result<()> { Ok(()) }
///
/// let bitmap = Arc::new(TrackedBitmap::tracked(0x8000_0000, 64 << 20, 16 << 10)?);
/// let tracker = WriteTracker::new(bitmap, Policy::default())?;
///
/// // Until it is protected, nothing is known to be clean: the first checkpoint has all of it.
/// let epoch = tracker.arm(&Stage2)?;
/// write_full()?;
/// epoch.release()?;
///
/// // A vCPU's write faults: on return the page is open and marked, and the vCPU may go on.
/// tracker.on_write_fault(0x8012_3456, &Stage2)?;
/// // What the host writes never faults: written, then marked.
/// tracker.bitmap().set_range(0x8000_0000, 512)?;
///
/// let epoch = tracker.arm(&Stage2)?;
/// write_diff(epoch.bitmap())?; // had this failed, its marks would be back
/// epoch.release()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct WriteTracker {
    bitmap: Arc<TrackedBitmap>,
    blocks: Blocks,
    _claim: Claim,
}

/// What makes a tracker the only one of its bitmap.
struct Claim(Option<Arc<TrackedBitmap>>);

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(bitmap) = &self.0 {
            bitmap.epochs.tracked.store(false, SeqCst);
        }
    }
}

impl WriteTracker {
    /// Tracks the RAM of `bitmap`, in pages of its page size, which must be what the platform can protect. All of the RAM is marked:
    /// nothing is protected yet, so nothing is known to be clean.
    ///
    /// # Errors
    /// [`TrackerError`]: RAM that is no whole number of pages, pages larger than a [block](BLOCK_SIZE), or another tracker of this bitmap.
    /// Nothing was marked.
    pub fn new(bitmap: Arc<TrackedBitmap>, policy: Policy) -> Result<Self, TrackerError> {
        let (ram_start, ram_size) = (bitmap.ram_start(), bitmap.ram_size());
        let page_size = bitmap.page_size();
        if page_size > BLOCK_SIZE {
            return Err(TrackerError::PageLargerThanBlock { page_size });
        }
        if !ram_start.is_multiple_of(page_size) || !ram_size.is_multiple_of(page_size) {
            return Err(TrackerError::NotAligned {
                ram_start,
                ram_size,
                page_size,
            });
        }
        let blocks = Blocks::new(ram_size.div_ceil(BLOCK_SIZE), page_size, policy)
            .map_err(TrackerError::OutOfMemory)?;
        if bitmap.epochs.tracked.swap(true, SeqCst) {
            return Err(TrackerError::AlreadyTracked);
        }
        bitmap.marks.mark_offsets(0..ram_size);
        Ok(Self {
            _claim: Claim(Some(Arc::clone(&bitmap))),
            bitmap,
            blocks,
        })
    }

    /// Another view of the same protected RAM, whose faults open what `policy` says: models of races between policies have one.
    #[cfg(memsnap_loom)]
    #[doc(hidden)]
    #[must_use]
    pub fn with_policy(&self, policy: Policy) -> Self {
        let bitmap = Arc::clone(&self.bitmap);
        let blocks = bitmap.ram_size().div_ceil(BLOCK_SIZE);
        Self {
            blocks: Blocks::new(blocks, bitmap.page_size(), policy).expect("memory"),
            bitmap,
            _claim: Claim(None),
        }
    }

    /// Where the marks are, and where the host's own writes are to be marked.
    #[must_use]
    pub fn bitmap(&self) -> &Arc<TrackedBitmap> {
        &self.bitmap
    }

    /// How many blocks are written all over so often that they are opened whole, as things stand.
    #[must_use]
    pub fn whole_blocks(&self) -> u64 {
        self.blocks.whole()
    }

    /// Answers a write fault at `address`: lifts the protection of its page or of more of its block, then marks what was lifted, and says
    /// what of that is around the address. Only then may the write go on.
    ///
    /// Where a platform refuses a page (Linux allows so many mappings only), the block is opened instead, and last all of the RAM.
    ///
    /// # Errors
    /// [`FaultError`]: outside the RAM, or nothing could be opened. What may be open is marked all the same; the write must not go on.
    pub fn on_write_fault<P: WriteProtection>(
        &self,
        address: u64,
        protection: &P,
    ) -> Result<Range<u64>, FaultError<P::Error>> {
        let offset = self
            .bitmap
            .marks
            .offset_of(address)
            .map_err(FaultError::OutOfRange)?;
        let (start, size) = (self.bitmap.ram_start(), self.bitmap.ram_size());
        let page_size = self.bitmap.page_size();
        // Offsets, not addresses: the end of a block that reaches past the RAM may be no 64-bit
        // address.
        let around = |unit: u64| {
            let from = offset - offset % unit;
            from..size.min(from + unit)
        };
        let (page, block) = (around(page_size), around(BLOCK_SIZE));
        let open = |offsets: Range<u64>| {
            let range = start + offsets.start..start + offsets.end;
            let lifted = protection.lift(range.clone());
            // Also where that failed: part of it may be open.
            self.bitmap.marks.mark_offsets(offsets);
            match lifted {
                Ok(()) => Ok(range),
                Err(source) => Err(FaultError::Lift { range, source }),
            }
        };
        let in_block = (page.start - block.start) / page_size;
        let opening = self
            .blocks
            .on_fault((offset / BLOCK_SIZE) as usize, in_block as u32);
        let opened = match opening {
            Opening::Page => open(page),
            Opening::Block => open(block.clone()),
            Opening::AllBut(sample) => {
                let at = |page: u32| block.end.min(block.start + u64::from(page) * page_size);
                let (before, after) = (block.start..at(sample.start), at(sample.end)..block.end);
                let (here, there) = match before.contains(&page.start) {
                    true => (before, after),
                    false => (after, before),
                };
                // The other side is opened ahead: what fails there fails again where somebody waits for it.
                if !there.is_empty() {
                    let _ = open(there);
                }
                open(here)
            }
        };
        opened.or_else(|refused| {
            let wider = open(block).or_else(|_| open(0..size));
            wider.map_err(|_| refused)
        })
    }

    /// A checkpoint: takes all marks into an epoch, protects what they cover, and decides what faults open from here on. On return, every page
    /// of the epoch may be copied: a write to it faults, and marks it for the next.
    ///
    /// vCPUs may run. For an image of one moment they must not, until the pages are copied.
    ///
    /// # Errors
    /// [`ArmError`]: a save is under way, or the protection failed. All marks are back.
    pub fn arm<P: WriteProtection>(
        &self,
        protection: &P,
    ) -> Result<TrackedEpoch, ArmError<P::Error>> {
        let epoch = Epoch::begin_any(Arc::clone(&self.bitmap)).map_err(ArmError::Epoch)?;
        self.end_interval(epoch.bitmap().runs(), protection)?;
        Ok(epoch)
    }

    /// Adds to the epoch of a save under way what was marked since, protects it, and returns just that (pre-copy: the guest runs while most of
    /// it is saved, and is paused for the rest).
    ///
    /// # Errors
    /// [`ArmError`]. What is not protected is marked, for the next epoch too. The epoch of another bitmap is refused: its pages
    /// are not this tracker's to protect.
    pub fn arm_more<'e, P: WriteProtection>(
        &self,
        epoch: &'e mut TrackedEpoch,
        protection: &P,
    ) -> Result<&'e TakenBitmap, ArmError<P::Error>> {
        if !Arc::ptr_eq(epoch.live(), &self.bitmap) {
            return Err(ArmError::OtherBitmap);
        }
        let more = epoch.take_more_any().map_err(ArmError::More)?;
        if let Err(error) = self.end_interval(more.runs(), protection) {
            self.bitmap.marks.add(&more.marks);
            return Err(error);
        }
        Ok(more)
    }

    /// Takes the marks of the open epoch back, and says whether there was one; see
    /// [`DirtyBitmap::reclaim_epoch`](crate::DirtyBitmap::reclaim_epoch).
    ///
    /// # Errors
    /// [`EpochCommitting`] while the save commits.
    pub fn reclaim_epoch(&self) -> Result<bool, EpochCommitting> {
        self.bitmap.epochs.reclaim(&self.bitmap.marks)
    }

    /// Protects what was `taken`, and looks at each block of it.
    fn end_interval<P: WriteProtection>(
        &self,
        taken: Runs<'_>,
        protection: &P,
    ) -> Result<(), ArmError<P::Error>> {
        let start = self.bitmap.ram_start();
        let page_size = self.bitmap.page_size();
        let mut dirty = (0, 0);
        let mut pending: Option<Range<u64>> = None;
        let protect = |range: Range<u64>| {
            let range = start + range.start..start + range.end;
            let Err(source) = protection.protect(range.clone()) else {
                return Ok(());
            };
            // Too many pieces, perhaps: all of the RAM is one.
            let all = start..start + self.bitmap.ram_size();
            let retried = protection.protect(all);
            retried.map_err(|_| ArmError::Protect { range, source })
        };
        for run in taken {
            // The bitmap may have been rebuilt finer than what can be protected.
            let run = run.start / page_size * page_size..run.end.next_multiple_of(page_size);
            let mut at = run.start;
            while at < run.end {
                let block = at / BLOCK_SIZE;
                let end = run.end.min((block + 1) * BLOCK_SIZE);
                if block != dirty.0 {
                    self.blocks.on_checkpoint(dirty.0 as usize, dirty.1);
                    dirty = (block, 0);
                }
                dirty.1 += u32::try_from((end - at) / page_size).unwrap_or(u32::MAX);
                at = end;
            }
            let near = |before: &Range<u64>| run.start <= before.end + BRIDGED_PAGES * page_size;
            pending = Some(match pending {
                Some(before) if near(&before) => before.start..run.end,
                Some(before) => {
                    protect(before)?;
                    run
                }
                None => run,
            });
        }
        self.blocks.on_checkpoint(dirty.0 as usize, dirty.1);
        pending.map_or(Ok(()), protect)
    }
}

impl fmt::Debug for WriteTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteTracker")
            .field("bitmap", &self.bitmap)
            .field("whole_blocks", &self.whole_blocks())
            .finish_non_exhaustive()
    }
}

/// RAM that can't be tracked by write faults. Nothing was marked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackerError {
    /// A page is larger than a [block](BLOCK_SIZE).
    #[error("a page of {page_size} bytes: writes are tracked in pages of at most {BLOCK_SIZE}")]
    PageLargerThanBlock {
        /// The bitmap's page size in bytes.
        page_size: u64,
    },
    /// The RAM does not begin or does not end with a page.
    #[error(
        "RAM of {ram_size:#x} bytes from {ram_start:#x} on is no whole number of pages of {page_size} bytes: \
         what can't be protected can't be tracked"
    )]
    NotAligned {
        /// The first address of the RAM.
        ram_start: u64,
        /// Its size in bytes.
        ram_size: u64,
        /// The bitmap's page size in bytes.
        page_size: u64,
    },
    /// Another tracker has the bitmap. Each would take marks whose pages only the other protects again.
    #[error("the bitmap has another tracker: drop that first, or give each a bitmap of its own")]
    AlreadyTracked,
    /// The host has no memory for what is kept of each block.
    #[error("writes can't be tracked")]
    OutOfMemory(#[source] GeometryError),
}

/// A write fault that could not be answered: the write must not go on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultError<E: Error + 'static> {
    /// The address is not tracked.
    #[error("a write fault outside the tracked RAM: it is another device's")]
    OutOfRange(#[source] OutOfRange),
    /// The protection could not be lifted. What may be open nevertheless is marked.
    #[error("can't lift the write protection of {:#x}..{:#x}", range.start, range.end)]
    Lift {
        /// The addresses that were to be opened.
        range: Range<u64>,
        /// What the platform says.
        source: E,
    },
}

/// A checkpoint that could not be made.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArmError<E: Error + 'static> {
    /// No epoch could begin. No mark was taken.
    #[error("no checkpoint can begin")]
    Epoch(#[source] BeginEpochError),
    /// The epoch can't be extended. No mark was taken.
    #[error("the checkpoint can't be extended")]
    More(#[source] TakeMoreError),
    /// The epoch is of another bitmap. No mark was taken.
    #[error("the epoch is of another tracker's bitmap: extend it by that tracker")]
    OtherBitmap,
    /// The protection failed, and of all the RAM too. What it was for is marked.
    #[error("can't write-protect {:#x}..{:#x} again: its pages stay dirty", range.start, range.end)]
    Protect {
        /// The addresses that were to be protected.
        range: Range<u64>,
        /// What the platform says.
        source: E,
    },
}
