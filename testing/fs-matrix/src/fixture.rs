//! A mounted directory to check, and what is around it.

use std::path::PathBuf;

use scenarios::directory::names;
use scenarios::target::Target;

#[cfg(target_os = "linux")]
use super::nfs::Server;

/// Where the checks run.
pub(crate) struct Fixture {
    /// An empty directory on the file system to check; each check gets a new one.
    pub dir: PathBuf,
    /// A directory on a small file system of the same kind, to fill up.
    pub small: Option<PathBuf>,
    /// A directory on any other file system.
    pub elsewhere: PathBuf,
    /// The library, or a deliberately broken one.
    pub target: Target,
    /// The NFS server behind the mount, if this process may stop and start it.
    #[cfg(target_os = "linux")]
    pub server: Option<Server>,
}

impl Fixture {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn has_server(&self) -> bool {
        #[cfg(target_os = "linux")]
        return self.server.is_some();
        #[cfg(not(target_os = "linux"))]
        false
    }

    /// The names in the directory, sorted, but for those in `but`. NFS keeps removed files that are
    /// still open under names of its own.
    pub(crate) fn leftovers(&self, but: &[&str]) -> anyhow::Result<Vec<String>> {
        names(&self.dir, but)
    }
}
