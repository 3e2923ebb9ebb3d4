//! The directory of an image's file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Image, identity_of};
use crate::error::OpenImageError;

impl Image {
    /// Returns the directory of its file, also if the image was opened by a link in another
    /// directory, or as an open file that still has a name.
    ///
    /// # Errors
    /// Returns [`OpenImageError::Open`] if the path does not exist any more, and
    /// [`OpenImageError::NoDirectory`] for a reader and for an open file without a name.
    pub fn directory(&self) -> Result<PathBuf, OpenImageError> {
        let path = match self.has_path {
            true => self.resolved()?,
            false => self
                .name_of_open_file()
                .ok_or_else(|| OpenImageError::NoDirectory {
                    path: self.path.clone(),
                })?,
        };
        Ok(match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        })
    }

    fn resolved(&self) -> Result<PathBuf, OpenImageError> {
        match fs::canonicalize(&self.path) {
            // The working directory may be nested deeper than an absolute path can express.
            Err(error) if is_too_long(&error) && !self.path.is_symlink() => Ok(self.path.clone()),
            found => found.map_err(|source| OpenImageError::Open {
                path: self.path.clone(),
                source,
            }),
        }
    }

    /// Returns a path that leads to the file, if there is one.
    fn name_of_open_file(&self) -> Option<PathBuf> {
        let path = path_of(&*self.file().ok()?)?;
        self.is_at(&path).then_some(path)
    }

    /// Returns whether `path` leads to the file.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        let metadata = fs::metadata(path);
        let found = metadata.ok().map(|it| identity_of(&it));
        found.is_some() && found == self.identity()
    }
}

/// Returns the path of an open file, as the kernel knows it.
#[cfg(target_os = "linux")]
fn path_of(file: &fs::File) -> Option<PathBuf> {
    use std::os::fd::AsRawFd;
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

#[cfg(not(target_os = "linux"))]
fn path_of(_: &fs::File) -> Option<PathBuf> {
    None
}

fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::ENAMETOOLONG as i32)
}
