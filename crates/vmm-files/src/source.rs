//! Files that are read, and checked reads of their structure.

use std::borrow::Cow;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::OFlag;
use page_reader::FileReader;

use crate::error::OpenError;
use crate::format::Format;

/// Opens a file for reading. Opening a FIFO must not wait for its writer.
pub(crate) fn open_without_waiting(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
}

/// An open file of a format.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<File>,
    /// Knows the holes of the file.
    pub(crate) reader: FileReader<Arc<File>>,
    pub(crate) len: u64,
    pub(crate) format: Format,
    version: Version,
}

/// What changes with every write to a file.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    len: u64,
    modified: (i64, i64),
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// The payload of the error of a file that was changed after it was opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path:?} was written to or resized since it was opened: repeat the copy while nothing writes to it"
)]
struct Changed {
    path: PathBuf,
}

impl Source {
    pub(crate) fn open(path: &Path, format: Format) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io {
            path: path.to_owned(),
            source,
        };
        let file = open_without_waiting(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            )));
        }
        let file = Arc::new(file);
        Ok(Self {
            path: path.to_owned(),
            len: metadata.len(),
            version: Version::of(&metadata),
            reader: FileReader::new(Arc::clone(&file)),
            file,
            format,
        })
    }

    /// Fails if the file was changed since it was opened.
    pub(crate) fn check_unchanged(&self) -> io::Result<()> {
        match Version::of(&self.file.metadata()?) == self.version {
            true => Ok(()),
            false => Err(io::Error::other(Changed {
                path: self.path.clone(),
            })),
        }
    }

    pub(crate) fn invalid(&self, offset: u64, problem: impl Into<Cow<'static, str>>) -> OpenError {
        OpenError::Invalid {
            path: self.path.clone(),
            format: self.format,
            offset,
            problem: problem.into(),
        }
    }

    /// Checks that `len` bytes at `at` are inside the file.
    pub(crate) fn check_range(&self, at: u64, len: u64, field: u64) -> Result<(), OpenError> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => {
                let end = u128::from(at) + u128::from(len);
                let problem = format!(
                    "it names bytes {at:#x} to {end:#x}, and the file has {:#x}: the file is cut short or \
                     damaged, so copy it again",
                    self.len
                );
                Err(self.invalid(field, problem))
            }
        }
    }

    /// Fills `buf` with the bytes at `at`.
    pub(crate) fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), OpenError> {
        self.check_range(at, buf.len() as u64, at)?;
        let read = self.file.read_exact_at(buf, at);
        read.map_err(|source| OpenError::Io {
            path: self.path.clone(),
            source,
        })
    }

    /// Returns the bytes at `at`.
    pub(crate) fn bytes<const N: usize>(&self, at: u64) -> Result<[u8; N], OpenError> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Returns up to `most` bytes at `at`, fewer at the end of the file.
    pub(crate) fn up_to(&self, at: u64, most: usize) -> Result<Vec<u8>, OpenError> {
        let left = usize::try_from(self.len.saturating_sub(at)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(most)];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }
}

/// Returns the little-endian number at an offset in `bytes`, which has it.
pub(crate) fn le<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(number)
}
