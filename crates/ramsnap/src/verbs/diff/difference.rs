//! The pages that differ between two states, as they are printed.

use dirty_bitmap::DirtyBitmap;
use serde::Serialize;

#[derive(Debug, Serialize)]
pub(super) struct Printed {
    pub(super) page_bytes: u64,
    pub(super) pages: u64,
    pub(super) bytes: u64,
    pub(super) runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Printed {
    pub(super) fn of(changed: &DirtyBitmap) -> Self {
        let runs = changed.runs().map(|run| Run {
            offset: run.start,
            bytes: run.end - run.start,
        });
        let runs: Vec<_> = runs.collect();
        let bytes = runs.iter().map(|run| run.bytes).sum();
        Self {
            page_bytes: changed.page_size(),
            pages: bytes / changed.page_size(),
            bytes,
            runs,
        }
    }
}
