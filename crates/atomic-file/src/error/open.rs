//! Errors of opening a writer.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::commit::Leftover;
use super::recover::RecoverError;
use crate::attribute::NotPreserved;
use crate::ids::UserId;

/// An error of opening a writer. The destination is unchanged, and no file is left behind except
/// those that the error names.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The path ends in `/`, `.` or `..`, or is empty.
    #[error("{path:?} does not name a file: give a path that ends in a file name")]
    NoFileName {
        /// The path given.
        path: PathBuf,
    },
    /// The name is reserved for staged files and group records: a sweep would remove such a file,
    /// or a recovery read it.
    #[error("{path:?} is reserved for staged files and group records: choose another name")]
    ReservedName {
        /// The destination, or where its link leads to.
        path: PathBuf,
    },
    /// The destination's directory, or the staging directory, cannot be opened.
    #[error(
        "cannot open the directory {path:?}: it must exist and be readable and writable: \
         {source}"
    )]
    OpenDirectory {
        /// The directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The destination is a directory, device, FIFO or socket.
    #[error(
        "{path:?} is {}: only a regular file can be replaced",
        if *is_dir { "a directory" } else { "a device, FIFO or socket" }
    )]
    NotAFile {
        /// The destination.
        path: PathBuf,
        /// Whether it is a directory.
        is_dir: bool,
    },
    /// The destination is a dangling symbolic link.
    #[error(
        "{path:?} is a symbolic link to {target:?}, which does not exist (a disk not mounted?): \
         create the target, or replace the link itself with `Symlinks::Replace`"
    )]
    DanglingSymlink {
        /// The destination.
        path: PathBuf,
        /// The target of the last link, as stored in the link.
        target: PathBuf,
    },
    /// The destination is a symbolic link that another user may have created: in a directory of a
    /// user other than this one and root, or in one that [others may write
    /// to](crate::others_may_write).
    #[error(
        "{path:?} is a symbolic link of {}, in a directory where another user, its group or all \
         users may create links: name its target, replace the link itself with \
         `Symlinks::Replace`, or make the directory private (chown, chmod go-w)",
        UserId::new(*owner)
    )]
    UntrustedSymlink {
        /// The link.
        path: PathBuf,
        /// The user id of the link's owner.
        owner: u32,
    },
    /// The destination is, or a symbolic link leads to, a magic link of Linux: `/proc/PID/fd/N`,
    /// `/dev/fd/N` or `/dev/stdout`. Such a link leads to an open file. Its text is a path that the
    /// file once had, perhaps in another mount namespace, and may name another file.
    #[error(
        "{path:?} is, or leads to, {link:?}, a link to an open file, which cannot be replaced by \
         its descriptor: open the file by its path"
    )]
    MagicLink {
        /// The destination.
        path: PathBuf,
        /// The link that leads to an open file.
        link: PathBuf,
    },
    /// The destination exists, and [`no_clobber`](crate::AtomicWriterOptions::no_clobber) is set.
    #[error("{path:?} exists, and `no_clobber` is set: choose another name, or remove it")]
    AlreadyExists {
        /// The destination.
        path: PathBuf,
    },
    /// The destination is not the version to [replace](crate::AtomicWriterOptions::replace_only).
    #[error(
        "{path:?} was replaced, removed or written to by another writer since it was read: \
         read it again and open a new writer"
    )]
    DestinationChanged {
        /// The destination.
        path: PathBuf,
    },
    /// The rename of the commit would fail.
    #[error("{path:?} cannot be replaced: {obstacle}")]
    CannotReplace {
        /// The destination.
        path: PathBuf,
        /// The reason.
        obstacle: Obstacle,
    },
    /// The new file cannot receive an attribute of the replaced file that
    /// [`preserve`](crate::AtomicWriterOptions::preserve) requests.
    #[error(
        "{path:?} would lose its {}: open it without preserving that, or with \
         `Preserve::if_permitted`: {source}",
        source.attribute
    )]
    NotPreserved {
        /// The destination.
        path: PathBuf,
        /// The attribute and the error of the system.
        source: NotPreserved,
    },
    /// No file can be created in the destination's directory or in the staging directory.
    #[error(
        "cannot stage a file for {path:?}: no file can be created in {dir:?}; grant write \
         permission for it, mount its file system writable, or choose another directory: {source}"
    )]
    NotWritable {
        /// The destination.
        path: PathBuf,
        /// The directory.
        dir: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The staging directory is on another file system than the destination.
    #[error(
        "cannot stage in {staging_dir:?}: {dest_dir:?} is on another file system; \
         stage in a directory of the same mount"
    )]
    CrossFileSystem {
        /// The destination's directory.
        dest_dir: PathBuf,
        /// The staging directory.
        staging_dir: PathBuf,
    },
    /// The file system supports neither a rename without replacing nor hard links.
    #[error(
        "the file system of {path:?} cannot rename without replacing: open without `no_clobber`: \
         {source}"
    )]
    NoClobberUnsupported {
        /// The destination.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The empty file of the preflight (for `no_clobber` or `staging_dir`) could not be removed.
    #[error(
        "cannot remove the file that checked whether {path:?} can be replaced: sweep the directory: \
         {source}"
    )]
    Leftover {
        /// The destination.
        path: PathBuf,
        /// The remaining file, and why it could not be removed.
        source: Leftover,
    },
    /// A group commit of a killed process in the destination's directory could not be completed.
    #[error("cannot complete the group commit pending in the directory of {path:?}: {source}")]
    Recover {
        /// The destination.
        path: PathBuf,
        /// The error of the recovery.
        source: RecoverError,
    },
    /// Any other failure of a system call.
    #[error("cannot {operation} {path:?}: {source}")]
    Io {
        /// The failed operation, as a verb such as `inspect`.
        operation: &'static str,
        /// The affected path.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

impl OpenError {
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

/// A condition, detected by `open`, that makes the rename onto the destination fail.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// The destination is a mount point.
    #[error("it is a mount point; unmount it, or give the path of the mounted file")]
    MountPoint,
    /// The destination is immutable.
    #[error("it is immutable; clear the attribute with `chattr -i` (macOS: `chflags nouchg`)")]
    Immutable,
    /// The destination is append-only.
    #[error("it is append-only; clear the attribute with `chattr -a` (macOS: `chflags nouappnd`)")]
    AppendOnly,
    /// The destination is in use as swap space.
    #[error("it is in use as swap space; disable it with `swapoff`")]
    Swap,
    /// The destination's directory, or the staging directory, is immutable.
    #[error(
        "its directory, or the staging directory, is immutable; clear the attribute with `chattr \
         -i`"
    )]
    ImmutableDirectory,
    /// The destination's directory, or the staging directory, is append-only: its files cannot be
    /// renamed.
    #[error(
        "its directory, or the staging directory, is append-only; clear the attribute with \
         `chattr -a`"
    )]
    AppendOnlyDirectory,
    /// The destination and its directory belong to other users, and the directory is sticky.
    #[error(
        "it belongs to {}, and its directory is sticky: only that user, the directory's owner and \
         root can replace it; choose another name",
        UserId::new(*owner)
    )]
    OthersInStickyDirectory {
        /// The user id of the destination's owner; the overflow id if this user namespace
        /// does not map it.
        owner: u32,
    },
}
