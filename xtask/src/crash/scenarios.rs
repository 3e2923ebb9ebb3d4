//! What is done to a disk whose power then goes, and what must be there after.

mod commits;
mod images;
pub mod mutants;

use std::path::Path;

use super::check::{Aftermath, Fault};

/// Something done in an empty directory of a disk. Small, as every write of it is a state to check.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    /// Before the power may go.
    pub prepare: fn(&Path) -> anyhow::Result<()>,
    /// Calls what it is given after every commit that returned.
    pub act: fn(&Path, Returned) -> anyhow::Result<()>,
    pub check: fn(&Aftermath) -> Result<(), Fault>,
}

/// To be told of a commit that returned.
pub type Returned<'a> = &'a (dyn Fn() -> anyhow::Result<()> + Sync);

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
