//! The entries of a directory.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// Returns the names in `dir`, sorted, but for those in `but`. NFS keeps removed files that are
/// still open under names of its own, which are left out.
pub fn names(dir: &Path, but: &[&str]) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("can't list {}", dir.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !but.contains(&name.as_str()) && !name.starts_with(".nfs") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
