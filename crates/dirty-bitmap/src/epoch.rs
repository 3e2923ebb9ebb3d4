//! Marks that are out for a save, and come back unless the save succeeds.

use std::ops::Deref;

use thiserror::Error;

use crate::bitmap::DirtyBitmap;
use crate::geometry::GeometryError;
use crate::sync::Ordering;

/// The marks that one save has taken out of a bitmap.
///
/// Dropped for whatever reason (an error, a panic, an early return), the epoch merges its marks back, and the next save
/// has them again. Only [`release`](Self::release) forgets them: call it when the save is durable, never before.
///
/// A bitmap has one epoch at a time. With two, the later one could become durable while the earlier one fails, and
/// the earlier one's pages would be in no diff of the chain. What is dirtied while a save runs joins its
/// epoch by [`take_more`](Self::take_more).
///
/// # Examples
/// A save whose guest keeps running (pre-copy):
/// ```
/// use dirty_bitmap::DirtyBitmap;
/// # fn save_full() {}
/// # fn save_diff(pages: &DirtyBitmap) {}
/// # fn commit() -> std::io::Result<()> { Ok(()) }
///
/// let bitmap = DirtyBitmap::new(0, 64 << 20, 4096)?;
/// let mut epoch = bitmap.begin_epoch()?; // a full save covers whatever was marked so far
/// save_full(); // the guest goes on, and marks
/// bitmap.set_dirty(0x3000)?;
/// let meanwhile = epoch.take_more()?; // the guest is paused now
/// save_diff(&meanwhile);
/// commit()?; // had this failed, all marks would be back
/// epoch.release();
/// assert!(bitmap.is_clean());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "an epoch that is dropped gives its marks back at once"]
pub struct Epoch<B: Deref<Target = DirtyBitmap>> {
    live: B,
    taken: DirtyBitmap,
    released: bool,
}

impl<B: Deref<Target = DirtyBitmap>> Epoch<B> {
    /// Takes all marks out of `live`. With an `Arc<DirtyBitmap>` the epoch can move to another thread;
    /// [`DirtyBitmap::begin_epoch`] borrows instead.
    ///
    /// # Errors
    /// [`BeginEpochError`] while another epoch holds marks of this bitmap, or where there is no memory for the marks: nothing was taken.
    pub fn begin(live: B) -> Result<Self, BeginEpochError> {
        if live.epoch_open.swap(true, Ordering::AcqRel) {
            return Err(BeginEpochError::AlreadyOpen);
        }
        match live.drain() {
            Ok(taken) => Ok(Self {
                live,
                taken,
                released: false,
            }),
            Err(source) => {
                live.epoch_open.store(false, Ordering::Release);
                Err(BeginEpochError::OutOfMemory(source))
            }
        }
    }

    /// All marks that this epoch has taken so far, to be looked at: what is drained from it is not given back.
    #[must_use]
    pub fn bitmap(&self) -> &DirtyBitmap {
        &self.taken
    }

    /// Takes what was marked since, adds it to this epoch, and returns just that.
    ///
    /// # Errors
    /// [`GeometryError::OutOfMemory`]: nothing was taken, and the epoch stays as it was.
    pub fn take_more(&mut self) -> Result<DirtyBitmap, GeometryError> {
        let more = self.live.drain()?;
        for run in more.runs() {
            self.taken.mark_offsets(run);
        }
        Ok(more)
    }

    /// Forgets the marks: the pages are durable.
    pub fn release(mut self) {
        self.released = true;
    }
}

impl<B: Deref<Target = DirtyBitmap>> Drop for Epoch<B> {
    fn drop(&mut self) {
        if !self.released {
            for run in self.taken.runs() {
                self.live.mark_offsets(run);
            }
        }
        // Only now: an epoch that began before the marks are back would miss them.
        self.live.epoch_open.store(false, Ordering::Release);
    }
}

/// An epoch could not begin. No mark was taken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BeginEpochError {
    /// Another epoch of this bitmap is neither released nor dropped.
    #[error("a save of this bitmap is under way: end it, or add to it with Epoch::take_more")]
    AlreadyOpen,
    /// There is no memory to hold the marks.
    #[error("the marks can't be taken out")]
    OutOfMemory(#[source] GeometryError),
}
