//! The error of finding a region, with the alternatives to choose from.

use page_reader::ProcessRegion;

/// An error of finding the region of a name: [`ProcessMaps::named`](crate::ProcessMaps::named).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindRegionError {
    /// No region has this name.
    #[error(
        "process {pid} has no mapping whose name contains {name:?}; its largest writable regions \
         are:{}",
        list(regions)
    )]
    NotFound {
        /// The process id.
        pid: u32,
        /// The name searched for.
        name: String,
        /// The largest [candidates](crate::ProcessMaps::candidates), at most 8.
        regions: Vec<ProcessRegion>,
    },
    /// Several regions have this name.
    #[error(
        "process {pid} has several mappings ({}) whose name contains {name:?}: give the address of \
         one of them:{}",
        regions.len(),
        list(regions)
    )]
    Ambiguous {
        /// The process id.
        pid: u32,
        /// The name searched for.
        name: String,
        /// All regions with this name.
        regions: Vec<ProcessRegion>,
    },
}

/// Formats each region on a separate line.
fn list(regions: &[ProcessRegion]) -> String {
    let line = |region| format!("\n  {region}");
    regions.iter().map(line).collect()
}
