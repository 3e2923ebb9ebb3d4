//! The file that a snapshot is written to.

use std::fs::File;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
#[cfg(target_os = "linux")]
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use atomic_file::{AtomicWriter, Durability, NotPreserved};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::error::OpenFileError;

/// The name of a file without a path, in errors.
const OPEN_FILE: &str = "(open file)";

/// The file that a snapshot is written to.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a writer has only one")]
pub(crate) enum Target {
    /// A staged file, which replaces its destination at the commit.
    Staged(AtomicWriter),
    /// A file that the caller has opened, and the durability of its commit.
    Open(File, Durability),
}

impl Target {
    /// Takes an open file, if a snapshot can be written to it.
    pub(crate) fn open(file: File, durability: Durability) -> Result<Self, OpenFileError> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(OpenFileError::NotAFile);
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(std::io::Error::from)?;
        let flags = OFlag::from_bits_retain(flags);
        if flags.intersection(OFlag::O_ACCMODE) != OFlag::O_RDWR {
            return Err(OpenFileError::NotReadWrite);
        }
        if flags.contains(OFlag::O_APPEND) {
            return Err(OpenFileError::Append);
        }
        #[cfg(target_os = "linux")]
        if flags.contains(OFlag::O_DIRECT) {
            return Err(OpenFileError::Direct);
        }
        match metadata.len() {
            0 => Ok(Self::Open(file, durability)),
            len => Err(OpenFileError::NotEmpty { len }),
        }
    }

    /// Checks that an open file has at least the `written` bytes. A staged file is written by this
    /// process alone.
    pub(crate) fn check_len(&self, written: u64) -> Result<(), OpenFileError> {
        match self {
            Self::Staged(_) => Ok(()),
            Self::Open(file, _) => match file.metadata()?.len() {
                len if len < written => Err(OpenFileError::Truncated { len, written }),
                _ => Ok(()),
            },
        }
    }

    /// Returns whether an open file has no name, so that no reader uses its holes: see
    /// `memory_image::ImageOptions::open_file`. A staged file gets its name at the commit.
    pub(crate) fn is_nameless(&self) -> bool {
        match self {
            Self::Staged(_) => false,
            Self::Open(file, _) => !has_name(file),
        }
    }

    pub(crate) fn file(&self) -> &File {
        match self {
            Self::Staged(staged) => staged.file(),
            Self::Open(file, _) => file,
        }
    }

    pub(crate) fn dest_path(&self) -> &Path {
        match self {
            Self::Staged(staged) => staged.dest_path(),
            Self::Open(..) => Path::new(OPEN_FILE),
        }
    }

    pub(crate) fn staged_path(&self) -> &Path {
        match self {
            Self::Staged(staged) => staged.staged_path(),
            Self::Open(..) => Path::new(OPEN_FILE),
        }
    }

    pub(crate) fn recycled(&self) -> bool {
        match self {
            Self::Staged(staged) => staged.recycled(),
            Self::Open(..) => false,
        }
    }

    pub(crate) fn not_preserved(&self) -> &[NotPreserved] {
        match self {
            Self::Staged(staged) => staged.not_preserved(),
            Self::Open(..) => &[],
        }
    }
}

/// Returns whether the name that the kernel knows of an open file leads to it.
#[cfg(target_os = "linux")]
fn has_name(file: &File) -> bool {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let named = || std::fs::metadata(std::fs::read_link(link)?);
    match (named(), file.metadata()) {
        (Ok(named), Ok(file)) => (named.dev(), named.ino()) == (file.dev(), file.ino()),
        _ => false,
    }
}

/// Returns true: the name is not known, and the holes of no file are used.
#[cfg(not(target_os = "linux"))]
fn has_name(_: &File) -> bool {
    true
}
