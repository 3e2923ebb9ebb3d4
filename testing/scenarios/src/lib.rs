//! Scenarios, and what must hold after a crash or a failure in one.
//!
//! A [`Scenario`] prepares a directory, acts in it, and checks a [`PostCrashState`] of it.
//! `crash-states` runs each with a loss of power at any moment, `syscall-faults` with an injected
//! fault at any system call. [`CommitObserver`] is how they learn which commits returned.
//!
//! Around it is what test programs share: RAM whose every word shows its version ([`ram`]), writers
//! in processes of their own ([`child`]), the library and mutants of it ([`target`]), and logs of
//! writes ([`write_log`]).

#![allow(
    missing_docs,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "for the workspace's own tests"
)]

pub mod check;
pub mod child;
pub mod commits;
pub mod directory;
pub mod images;
#[cfg(target_os = "linux")]
pub mod live;
pub mod ram;
pub mod target;
pub mod write_log;

use std::path::Path;
use std::sync::Arc;

use dirty_bitmap::DirtyBitmap;

pub use file_systems::start;

use check::{PostCrashState, Violation};

/// Work in an empty directory of a disk. Small: every write of it is a state to check.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    /// Before the power may go.
    pub prepare: fn(&Path) -> anyhow::Result<()>,
    /// Reports every commit that returned to the observer.
    pub act: fn(&Path, &dyn CommitObserver) -> anyhow::Result<()>,
    pub check: fn(&PostCrashState) -> Result<(), Violation>,
}

/// Observes the commits of a scenario.
pub trait CommitObserver: Sync {
    /// A commit returned.
    fn returned(&self) -> anyhow::Result<()>;

    /// A commit is between two steps.
    fn between(&self) -> anyhow::Result<()> {
        Ok(())
    }

    /// The next commit is to take these marks, all that there are.
    fn saving(&self, _marks: &Arc<DirtyBitmap>) {}
}

impl<F: Fn() -> anyhow::Result<()> + Sync> CommitObserver for F {
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
    #[cfg(target_os = "linux")]
    live::LIVE,
    #[cfg(target_os = "linux")]
    live::LIVE_DIFF,
];
