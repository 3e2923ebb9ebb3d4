//! A comparison of the pages that a save wrote with the marks that an epoch took.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bitmap::DirtyBitmap;
use crate::epoch::Epoch;

/// The number that the next take of marks or full write in this process gets. The first one is 1,
/// because 0 stands for no number.
///
/// The numbers also order memory: an operation with a larger number sees the effects of one with a
/// smaller number.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

fn next_number() -> u64 {
    NEXT_NUMBER.fetch_add(1, Ordering::SeqCst)
}

/// The takes of an epoch that the marks of a bitmap are from.
///
/// A take removes all marks from a bitmap. An epoch has one at its start and one each time it is
/// extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TakeRange {
    /// Identifies the epoch.
    epoch: u64,
    /// The number of the take before the first of this range, or 0 if the range begins with the
    /// first take.
    after: u64,
    /// The number of the last take of this range. A take that found no mark has no number.
    last: u64,
}

impl TakeRange {
    /// Returns the range of the first take of a new epoch. Call it after the marks were taken.
    pub(crate) fn first(is_clean: bool) -> Self {
        let epoch = next_number();
        let last = if is_clean { 0 } else { epoch };
        Self {
            epoch,
            after: 0,
            last,
        }
    }

    /// Returns the range of the next take of the same epoch. Call it after the marks were taken.
    pub(crate) fn next(self, is_clean: bool) -> Self {
        Self {
            epoch: self.epoch,
            after: self.last,
            last: if is_clean { self.last } else { next_number() },
        }
    }

    /// Extends this range back to the first take of the epoch.
    pub(crate) fn since_first(self) -> Self {
        Self { after: 0, ..self }
    }
}

/// A record of what a save wrote, to check that it wrote every page that an [`Epoch`] took.
///
/// A full write covers the marks that were taken *before it began*. A page that was written and
/// marked later may have been copied before that.
///
/// A diff covers the marks of the bitmap it was written from, if that bitmap belongs to an epoch:
/// [`Epoch::bitmap`], or the return value of [`Epoch::extend`]. A diff of the bitmap that the
/// guest marks covers nothing, because marks may be added and taken after the write.
///
/// # Examples
/// ```
/// use dirty_bitmap::{Coverage, DirtyBitmap};
///
/// let bitmap = DirtyBitmap::new(0, 1 << 20, 4096)?;
/// bitmap.mark(0)?;
/// let mut epoch = bitmap.begin_epoch()?;
/// let mut written = Coverage::new();
/// written.add_diff(epoch.bitmap()); // once its pages are written
/// assert!(written.covers(&epoch));
///
/// bitmap.mark(4096)?;
/// let _dirtied = epoch.extend()?; // not written
/// assert!(!written.covers(&epoch));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "a coverage that is dropped cannot be compared with an epoch"]
pub struct Coverage {
    /// The number of the latest full write.
    full: u64,
    /// For each epoch, the number of the last take up to which diffs have written every page.
    diffs: BTreeMap<u64, u64>,
}

/// The start of a full write, returned by [`Coverage::begin_full`].
#[derive(Debug)]
#[must_use = "a full write counts only when it is passed to `add_full`"]
pub struct FullBegan(u64);

impl Coverage {
    /// Creates a record of no writes, which covers nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records the start of a write of all RAM. Call it before the first byte is read.
    pub fn begin_full() -> FullBegan {
        FullBegan(next_number())
    }

    /// Adds a successful write of all RAM.
    pub fn add_full(&mut self, began: FullBegan) {
        self.full = self.full.max(began.0);
    }

    /// Adds a successful write of the pages marked in `marks`.
    pub fn add_diff<K>(&mut self, marks: &DirtyBitmap<K>) {
        let Some(takes) = marks.takes() else {
            return;
        };
        let written = self.written(takes);
        // Otherwise the write of an earlier take is missing.
        if takes.after <= written {
            self.diffs.insert(takes.epoch, written.max(takes.last));
        }
    }

    /// Removes all writes, because other bytes replaced what they wrote.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Returns whether every page whose mark `epoch` took was written after the take.
    ///
    /// The caller ensures that each full write was of the RAM that the bitmap of the epoch covers.
    /// [`Epoch::check_written`] makes the same check, and has marks that are added later prevent a
    /// release.
    #[must_use]
    pub fn covers<K, B: Deref<Target = DirtyBitmap<K>>>(&self, epoch: &Epoch<B, K>) -> bool {
        let takes = epoch.bitmap().takes();
        takes.is_some_and(|takes| self.has(takes))
    }

    /// Returns whether every page of these takes was written.
    pub(crate) fn has(&self, takes: TakeRange) -> bool {
        takes.last <= self.written(takes)
    }

    /// Returns the number up to which the takes of this epoch were written.
    fn written(&self, takes: TakeRange) -> u64 {
        let diffs = self.diffs.get(&takes.epoch);
        self.full.max(diffs.copied().unwrap_or(0))
    }
}
