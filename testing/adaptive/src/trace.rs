//! Traces of the pages that a guest wrote between checkpoints.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// Whether one granularity suits the whole trace, or different granularities suit different blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Kind {
    Plain,
    Mixed,
}

/// The writes of a guest.
///
/// A page that is written repeatedly between two checkpoints may be listed once, because only the
/// first write faults.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Trace {
    pub name: String,
    pub about: String,
    pub kind: Kind,
    /// The page size in bytes.
    pub page_size: u64,
    /// The number of pages of the RAM.
    pub pages: u32,
    /// The pages written in each interval, in order.
    pub intervals: Vec<Vec<u32>>,
}

impl Trace {
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
        postcard::from_bytes(&bytes)
            .with_context(|| format!("failed to parse the trace {}", path.display()))
    }

    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let parent = path.parent().context("the trace has no directory")?;
        fs::create_dir_all(parent)?;
        fs::write(path, postcard::to_stdvec(self)?)
            .with_context(|| format!("failed to write {}", path.display()))
    }
}
