//! Mounts file systems from image files over loop devices.

use std::io;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::disk::Journal;
use crate::loop_device::LoopDevice;
use crate::mounts::Mounted;
use crate::table::FileSystem;

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
    /// `Unsupported` if `fs` is not on a disk that this machine mounts; the output of the tool that
    /// failed, the error of starting it, or that of `mount(2)`.
    pub fn new(fs: &FileSystem) -> io::Result<Self> {
        Self::on_image(fs, NamedTempFile::new()?)
    }

    /// Creates and mounts a file system in a file of the caller, who may keep it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn on_image(fs: &FileSystem, image: NamedTempFile) -> io::Result<Self> {
        Self::made(fs, image, 512)
    }

    /// Creates a file system like [`new`](Self::new) on a disk whose sectors have 512 to 4096
    /// bytes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_sectors(fs: &FileSystem, bytes: u32) -> io::Result<Self> {
        Self::made(fs, NamedTempFile::new()?, bytes)
    }

    fn made(fs: &FileSystem, image: NamedTempFile, sectors: u32) -> io::Result<Self> {
        let disk = fs.disk().ok_or_else(|| {
            let why = format!("{} is not on a disk", fs.title);
            io::Error::new(io::ErrorKind::Unsupported, why)
        })?;
        image.as_file().set_len(disk.test_size)?;
        let device = LoopDevice::with_sectors(image.path(), None, sectors)?;
        disk.make(&device, false)?;
        let mounted = Mounted::new(|dir| disk.mount(&device, Journal::AsUsual, dir))?;
        Ok(Self {
            mounted,
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
