//! What a guest wrote between checkpoints, page by page, in order.

use std::fs;
use std::path::Path;

use anyhow::Context;

use super::report::Kind;

/// The writes of a guest. A page that is written often between two checkpoints need be there only once: only the first faults.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Trace {
    pub name: String,
    pub about: String,
    pub kind: Kind,
    /// Bytes of a page.
    pub page_size: u64,
    /// Pages of RAM.
    pub pages: u32,
    /// For each interval, the pages written, in order.
    pub intervals: Vec<Vec<u32>>,
}

impl Trace {
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
        postcard::from_bytes(&bytes).with_context(|| format!("{} is no trace", path.display()))
    }

    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let parent = path.parent().context("a trace has a directory")?;
        fs::create_dir_all(parent)?;
        fs::write(path, postcard::to_stdvec(self)?)
            .with_context(|| format!("can't write {}", path.display()))
    }
}
