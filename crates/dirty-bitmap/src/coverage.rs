//! What a save has written, compared with what an epoch has taken.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bitmap::DirtyBitmap;
use crate::epoch::Epoch;

/// Numbers every taking of marks and every full write of this process.
///
/// It orders them as well: whoever gets the larger number sees what the other did before its own.
static LAST: AtomicU64 = AtomicU64::new(0);

fn next_number() -> u64 {
    LAST.fetch_add(1, Ordering::SeqCst) + 1
}

/// Which takings of which epoch the marks of a bitmap are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Identifies the epoch.
    epoch: u64,
    /// The number of the last taking that is not among them; 0 where they begin with the first.
    after: u64,
    /// The number of the last taking that is among them. One that found no mark has no number.
    last: u64,
}

impl Part {
    /// What an epoch takes first. To be called once the marks are out.
    pub(crate) fn first(is_clean: bool) -> Self {
        let epoch = next_number();
        let last = if is_clean { 0 } else { epoch };
        Self {
            epoch,
            after: 0,
            last,
        }
    }

    /// What the same epoch takes next. To be called once the marks are out.
    pub(crate) fn more(self, is_clean: bool) -> Self {
        Self {
            epoch: self.epoch,
            after: self.last,
            last: if is_clean { self.last } else { next_number() },
        }
    }

    /// This and all before it.
    pub(crate) fn and_before(self) -> Self {
        Self { after: 0, ..self }
    }
}

/// Keeps account of what a save has written, to tell whether that is all that an [`Epoch`] has taken.
///
/// A full write covers what was taken *before it began*: a page that was written and marked since may have been copied
/// before. A diff covers the marks of the bitmap that it was written from, if that is an epoch's:
/// [`Epoch::bitmap`], or what [`Epoch::take_more`] returned. A diff of the bitmap that the guest marks covers
/// nothing, because marks may be added and taken after it.
///
/// # Examples
/// ```
/// use dirty_bitmap::{Coverage, DirtyBitmap};
///
/// let bitmap = DirtyBitmap::new(0, 1 << 20, 4096)?;
/// bitmap.set_dirty(0)?;
/// let mut epoch = bitmap.begin_epoch()?;
/// let mut written = Coverage::new();
/// written.add_diff(epoch.bitmap()); // once its pages are written
/// assert!(written.covers(&epoch));
///
/// bitmap.set_dirty(4096)?;
/// epoch.take_more()?; // and not written
/// assert!(!written.covers(&epoch));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// The number of the latest full write.
    full: u64,
    /// By epoch, the number of the last taking up to which all was written by diffs.
    diffs: BTreeMap<u64, u64>,
}

/// When a full write began: see [`Coverage::begin_full`].
#[derive(Debug)]
#[must_use = "a full write counts once it is added"]
pub struct FullBegan(u64);

impl Coverage {
    /// Covers nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes that a write of all of the RAM begins. To be called before the first byte is read.
    pub fn begin_full() -> FullBegan {
        FullBegan(next_number())
    }

    /// Adds a write of all of the RAM that has succeeded.
    pub fn add_full(&mut self, began: FullBegan) {
        self.full = self.full.max(began.0);
    }

    /// Adds a write, which has succeeded, of the pages that `marks` names.
    pub fn add_diff<K>(&mut self, marks: &DirtyBitmap<K>) {
        let Some(part) = marks.part() else {
            return;
        };
        let written = self.written(part);
        // Otherwise a taking between the two is missing.
        if part.after <= written {
            self.diffs.insert(part.epoch, written.max(part.last));
        }
    }

    /// Forgets all: what was written has been replaced by other bytes.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether every page that `epoch` has taken a mark of was written after that.
    ///
    /// Whether a full write was of the RAM that the epoch's bitmap is about, only the caller knows.
    #[must_use]
    pub fn covers<K, B: Deref<Target = DirtyBitmap<K>>>(&self, epoch: &Epoch<B, K>) -> bool {
        let part = epoch.bitmap().part();
        part.is_some_and(|part| part.last <= self.written(part))
    }

    fn written(&self, part: Part) -> u64 {
        let diffs = self.diffs.get(&part.epoch);
        self.full.max(diffs.copied().unwrap_or(0))
    }
}
