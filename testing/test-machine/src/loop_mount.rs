//! Mounts real file systems from image files over loop devices.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::NamedTempFile;

use crate::mounts::Mounted;

/// A file system that can be created in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopFs {
    /// ext4 by the kernel's driver (e2fsprogs).
    Ext4,
    /// ext4 with inodes of 128 bytes, which have no field for a time of creation (e2fsprogs).
    Ext4SmallInodes,
    /// XFS by the kernel's driver (xfsprogs).
    Xfs,
    /// XFS in blocks of 16 KiB: no hole is smaller. Linux mounts it since 6.12 (xfsprogs).
    Xfs16k,
    /// btrfs by the kernel's driver (btrfs-progs).
    Btrfs,
    /// exFAT by the FUSE driver (exfatprogs, exfat-fuse): a file system without holes.
    Exfat,
}

impl LoopFs {
    /// Returns the name of the file system, as in `mkfs.NAME`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 | Self::Ext4SmallInodes => "ext4",
            Self::Xfs | Self::Xfs16k => "xfs",
            Self::Btrfs => "btrfs",
            Self::Exfat => "exfat",
        }
    }

    /// Returns the size of the image, which is sparse. XFS refuses less than 300 MiB, btrfs less
    /// than 109 MiB.
    fn image_size(self) -> u64 {
        match self {
            Self::Xfs | Self::Xfs16k | Self::Btrfs => 320 << 20,
            Self::Ext4 | Self::Ext4SmallInodes | Self::Exfat => 128 << 20,
        }
    }

    fn mkfs(self) -> Command {
        let mut mkfs = tool(&format!("mkfs.{}", self.name()));
        match self {
            // A block of 4 KiB, as on disks of usual sizes. Small images have 1 KiB by default.
            Self::Ext4 => mkfs.args(["-q", "-F", "-b", "4096"]),
            Self::Ext4SmallInodes => mkfs.args(["-q", "-F", "-b", "4096", "-I", "128"]),
            Self::Xfs | Self::Btrfs => mkfs.arg("-q"),
            Self::Xfs16k => mkfs.args(["-q", "-b", "size=16384"]),
            Self::Exfat => &mut mkfs,
        };
        mkfs
    }

    fn mount(self) -> Command {
        if self == Self::Exfat {
            return tool("mount.exfat-fuse");
        }
        let mut mount = tool("mount");
        mount.args(["-t", self.name()]);
        mount
    }

    /// Returns whether the tools, loop devices and, for exFAT, FUSE are available. `Need::Root`
    /// checks the privilege.
    pub(crate) fn has_tools(self) -> bool {
        let helper = match self {
            Self::Exfat => "mount.exfat-fuse",
            _ => "mount",
        };
        let devices = match self {
            Self::Exfat => &["/dev/loop-control", "/dev/fuse"][..],
            _ => &["/dev/loop-control"][..],
        };
        let mkfs = format!("mkfs.{}", self.name());
        [&mkfs, helper, "losetup"]
            .iter()
            .all(|name| find_tool(name).is_some())
            && devices.iter().all(|device| Path::new(device).exists())
    }
}

impl fmt::Display for LoopFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A new, empty file system over a loop device. Unmounted and removed with its image on drop.
#[derive(Debug)]
pub struct LoopMount {
    // Before the image, so that it is unmounted first.
    mounted: Mounted,
    _image: NamedTempFile,
}

impl LoopMount {
    /// Creates a file system in a temporary image file and mounts it, on a disk of 512-byte
    /// sectors.
    ///
    /// # Errors
    /// The output of the tool that failed (`mkfs`, `losetup` or `mount`), or the error of starting
    /// it.
    pub fn new(fs: LoopFs) -> io::Result<Self> {
        Self::on_image(fs, NamedTempFile::new()?)
    }

    /// Creates and mounts a file system in a file of the caller, who may keep it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn on_image(fs: LoopFs, image: NamedTempFile) -> io::Result<Self> {
        Self::made(fs, image, 512)
    }

    /// Creates a file system like [`new`](Self::new) on a disk whose sectors have 512 to 4096
    /// bytes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_sectors(fs: LoopFs, bytes: u32) -> io::Result<Self> {
        Self::made(fs, NamedTempFile::new()?, bytes)
    }

    fn made(fs: LoopFs, image: NamedTempFile, sectors: u32) -> io::Result<Self> {
        image.as_file().set_len(fs.image_size())?;
        let device = run(tool("losetup")
            .args(["--find", "--show", "--sector-size", &sectors.to_string()])
            .arg(image.path()))?;
        let device = device.trim_end();
        let mounted = run(fs.mkfs().arg(device))
            .and_then(|_| Mounted::new(|dir| run(fs.mount().arg(device).arg(dir)).map(drop)));
        // Detaches now if mounting failed, otherwise once the file system is unmounted.
        run(tool("losetup").args(["--detach", device]))?;
        Ok(Self {
            mounted: mounted?,
            _image: image,
        })
    }

    /// Returns the mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mounted.path()
    }
}

impl AsRef<Path> for LoopMount {
    fn as_ref(&self) -> &Path {
        self.path()
    }
}

fn run(command: &mut Command) -> io::Result<String> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(io::Error::other(format!(
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim_end()
    )))
}

/// Returns a command for an administrator's tool. Also looks in the directories where Debian
/// installs them.
#[must_use]
pub fn tool(name: &str) -> Command {
    Command::new(find_tool(name).unwrap_or_else(|| name.into()))
}

/// Returns the path of a tool, from `PATH` and from the administrator's directories of Debian,
/// which `PATH` may lack.
pub(crate) fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}
