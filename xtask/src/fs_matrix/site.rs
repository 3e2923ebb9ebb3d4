//! A mounted directory to check, and what is around it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

#[cfg(target_os = "linux")]
use super::nfs::Server;
use super::subject::Subject;

/// Where the checks run.
pub struct Site {
    /// An empty directory on the file system to check; each check gets a new one.
    pub dir: PathBuf,
    /// A directory on a small file system of the same kind, to fill up.
    pub small: Option<PathBuf>,
    /// A directory on any other file system.
    pub elsewhere: PathBuf,
    /// The library, or a deliberately broken one.
    pub subject: Subject,
    /// The NFS server behind the mount, if this process may stop and start it.
    #[cfg(target_os = "linux")]
    pub server: Option<Server>,
}

impl Site {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn has_server(&self) -> bool {
        #[cfg(target_os = "linux")]
        return self.server.is_some();
        #[cfg(not(target_os = "linux"))]
        false
    }

    /// The names in the directory, sorted, but for those in `but`. NFS keeps removed files that are still open under names of its own.
    pub fn leftovers(&self, but: &[&str]) -> anyhow::Result<Vec<String>> {
        names(&self.dir, but)
    }
}

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
