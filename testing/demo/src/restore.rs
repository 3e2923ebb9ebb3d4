//! Bringing a guest back from its files.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::Context;
use guests::guest::Guest;
use memory_image::{Chain, ChainError, RamTarget};

use super::report::Progress;

/// The files from which a guest can be brought back.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// The full snapshot of the memory.
    pub full: PathBuf,
    /// The diffs, oldest first.
    pub diffs: Vec<Diff>,
    /// The vCPU state at the instant of the last of them.
    pub processor: PathBuf,
}

/// A diff, and the pages that it holds, in bytes.
#[derive(Debug)]
pub(crate) struct Diff {
    pub path: PathBuf,
    pub pages: Vec<Range<u64>>,
}

impl Files {
    /// Makes an empty guest the one that the snapshots were taken of.
    pub(crate) fn restore(
        &self,
        guest: &mut dyn Guest,
        page_size: u64,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let mut chain = Chain::open_raw(&self.full, page_size)?;
        for Diff { path, pages } in &self.diffs {
            match chain.push_raw(path) {
                // A file system without holes: the file alone does not say which pages it holds.
                Err(ChainError::AmbiguousDiff { .. }) => {
                    chain.push_pages(path, pages.iter().cloned())?
                }
                pushed => pushed?,
            }
        }
        progress.phase("restoring into a new guest", chain.ram_size());
        chain.restore_zeroed(&mut NewGuest {
            guest,
            size: chain.ram_size(),
            progress,
        })?;
        let state = fs::read(&self.processor);
        let state = state.with_context(|| format!("can't read {}", self.processor.display()))?;
        guest.set_processor(&state)
    }
}

/// A guest's memory as a chain restores to it.
struct NewGuest<'a> {
    guest: &'a mut dyn Guest,
    size: u64,
    progress: &'a Progress,
}

impl RamTarget for NewGuest<'_> {
    fn ram_size(&self) -> u64 {
        self.size
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.progress.at(offset).map_err(io::Error::other)?;
        self.guest.write(offset, bytes).map_err(io::Error::other)
    }
}
