//! What is done to a disk whose power then goes, and what must be there after.

pub mod commits;
pub mod images;
pub mod mutants;

use std::path::Path;
use std::sync::Arc;

use dirty_bitmap::DirtyBitmap;

use super::check::{Aftermath, Fault};

/// Something done in an empty directory of a disk. Small, as every write of it is a state to check.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    /// Before the power may go.
    pub prepare: fn(&Path) -> anyhow::Result<()>,
    /// Tells what it is given of every commit that returned.
    pub act: fn(&Path, &dyn Witness) -> anyhow::Result<()>,
    pub check: fn(&Aftermath) -> Result<(), Fault>,
}

/// Who watches what is done.
pub trait Witness: Sync {
    /// A commit returned.
    fn returned(&self) -> anyhow::Result<()>;

    /// A commit is between two steps.
    fn between(&self) -> anyhow::Result<()> {
        Ok(())
    }

    /// The next commit is to take these marks, all that there are.
    fn saving(&self, _marks: &Arc<DirtyBitmap>) {}
}

impl<F: Fn() -> anyhow::Result<()> + Sync> Witness for F {
    fn returned(&self) -> anyhow::Result<()> {
        self()
    }
}

pub const ALL: &[Scenario] = &[
    commits::REPLACE,
    commits::FIRST,
    commits::NO_CLOBBER,
    commits::GROUP,
    commits::FULL,
    commits::RECYCLE,
    commits::STALE_STAGE,
    commits::TWO_WRITERS,
    images::DIFF,
    images::SEALED,
    images::PACKED,
    images::MERGE,
];
