//! The chains of snapshots of one guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::tool::Tool;

/// Returns the name of a snapshot, by its place in the chain.
pub(super) fn name(snapshot: usize) -> String {
    match snapshot {
        0 => "full".into(),
        diff => format!("diff-{diff}"),
    }
}

/// Snapshots of one guest in one layout, the full one first.
pub(super) struct Chain {
    pub(super) tool: Tool,
    pub(super) files: Vec<PathBuf>,
}

/// Returns the paths of a chain as the tool takes them.
pub(super) fn paths(chain: &[PathBuf]) -> Vec<&Path> {
    chain.iter().map(PathBuf::as_path).collect()
}

/// Formats a time.
pub(super) fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}
