//! Making and mounting a file system on a loop device.

use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::loop_device::LoopDevice;
use crate::table::Disk;
use crate::tool::{find_tool, run, tool};

/// The message of mkfs.btrfs if another process detaches a loop device while mkfs.btrfs examines
/// all mounted ones.
const MOUNT_STATUS: &str = "cannot check mount status";
const ATTEMPTS: u32 = 100;

/// When the kernel commits the journal although nothing is synced.
#[derive(Clone, Copy, Debug)]
pub enum Journal {
    /// When it usually does.
    AsUsual,
    /// After this number of seconds, on a file system that commits by itself.
    CommittedAfter(u32),
}

impl Disk {
    /// Makes an empty file system. If `eager`, the driver has nothing to initialize later.
    ///
    /// # Errors
    /// The output of `mkfs`, or the error of starting it.
    pub fn make(&self, device: &LoopDevice, eager: bool) -> io::Result<()> {
        let (program, arguments) = self.mkfs.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut mkfs = tool(program);
        mkfs.args(arguments);
        if eager {
            mkfs.args(self.mkfs_eager);
        }
        mkfs.arg(device.path());
        let mut attempts = 0;
        loop {
            match run(&mut mkfs) {
                Err(error) if attempts < ATTEMPTS && error.to_string().contains(MOUNT_STATUS) => {
                    attempts += 1;
                }
                made => return made.map(drop),
            }
        }
    }

    /// Mounts the file system on `dir`.
    ///
    /// # Errors
    /// Those of `mount(2)`, or of the FUSE driver.
    pub fn mount(&self, device: &LoopDevice, journal: Journal, dir: &Path) -> io::Result<()> {
        let local = self.local.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{} is not mounted by this machine's kernel", self.driver),
            )
        })?;
        if let Some(fuse) = local.fuse {
            return run(tool(fuse).arg(device.path()).arg(dir)).map(drop);
        }
        let options = self.options_with(journal);
        let none = MsFlags::empty();
        let (device, options) = (Some(device.path()), Some(options.as_str()));
        Ok(mount(device, dir, Some(self.driver), none, options)?)
    }

    fn options_with(&self, journal: Journal) -> String {
        match journal {
            Journal::CommittedAfter(seconds) if self.commits_by_itself => {
                let comma = if self.options.is_empty() { "" } else { "," };
                format!("{}{comma}commit={seconds}", self.options)
            }
            Journal::CommittedAfter(_) | Journal::AsUsual => self.options.into(),
        }
    }

    /// Returns whether this machine has the tools, loop devices and, for a FUSE driver, FUSE. Does
    /// not check the privilege.
    #[must_use]
    pub fn has_tools(&self) -> bool {
        let Some(local) = self.local else {
            return false;
        };
        let device = |path: &str| Path::new(path).exists();
        let tools = self.mkfs.first().into_iter().copied();
        let tools = tools.chain(local.fuse).chain(["losetup"]);
        tools.into_iter().all(|name| find_tool(name).is_some())
            && device("/dev/loop-control")
            && (local.fuse.is_none() || device("/dev/fuse"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::FileSystem;

    #[test]
    fn only_a_journal_that_commits_by_itself_gets_an_interval() {
        let options = |fs: &FileSystem, journal| {
            let disk = fs.disk().expect("on a disk");
            disk.options_with(journal)
        };
        let soon = Journal::CommittedAfter(1);
        assert_eq!(options(FileSystem::EXT4, soon), "commit=1");
        assert_eq!(
            options(FileSystem::EXT4_WRITEBACK, soon),
            "data=writeback,commit=1"
        );
        assert_eq!(options(FileSystem::XFS, soon), "");
        assert_eq!(
            options(FileSystem::EXT4_WRITEBACK, Journal::AsUsual),
            "data=writeback"
        );
    }
}
