//! What was written through the owner of mapped memory.

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dirty_bitmap::{DirtyBitmap, GeometryError};
use guest_ram::OwnerBitmap;

use super::host_page;

/// The pages that were written through the owner of mapped memory, and the bitmaps of the RAM that
/// has taken the memory.
///
/// Lock order: a write is recorded after its bytes are stored. A RAM that takes the memory gets the
/// recorded marks and is listed under one lock. Therefore each write is marked by one of the two.
#[derive(Default)]
pub(super) struct HostWrites(Mutex<State>);

#[derive(Default)]
struct State {
    /// Allocated for the first write.
    written: Option<DirtyBitmap>,
    takers: Vec<OwnerBitmap>,
}

impl HostWrites {
    /// Allocates what [`record`](Self::record) needs for RAM of this size.
    pub(super) fn prepare(&self, ram_size: u64) -> Result<(), GeometryError> {
        let mut state = self.lock();
        if state.written.is_none() {
            // RAM that is smaller than a page of the host is one granule of at most its size.
            let page = 1 << host_page().min(ram_size).max(1).ilog2();
            state.written = Some(DirtyBitmap::new(0, ram_size, page)?);
        }
        Ok(())
    }

    /// Records a write of `range`, which was made.
    pub(super) fn record(&self, range: Range<u64>) {
        let state = self.lock();
        if let Some(written) = &state.written {
            let marked = written.mark_range(range.start, range.end - range.start);
            debug_assert!(marked.is_ok(), "the written range is inside the RAM");
        }
        for taker in &state.takers {
            taker.mark_offsets(range.clone());
        }
    }

    /// Marks all writes so far in `bitmap`, and later ones too.
    pub(super) fn mark_in(&self, bitmap: OwnerBitmap) {
        let mut state = self.lock();
        for run in state.written.iter().flat_map(DirtyBitmap::runs) {
            bitmap.mark_offsets(run);
        }
        if !state.takers.iter().any(|taker| taker.is_same(&bitmap)) {
            state.takers.push(bitmap);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic, the marks that are missing in one bitmap are still in the other.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for HostWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWrites").finish_non_exhaustive()
    }
}
