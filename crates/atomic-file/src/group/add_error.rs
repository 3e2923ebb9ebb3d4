//! Reasons why a writer cannot be a member of a group.

use thiserror::Error;

use crate::writer::AtomicWriter;

/// An error of adding a writer to an [`AtomicGroup`](crate::AtomicGroup). It contains the writer.
#[derive(Debug, Error)]
#[error("{:?} cannot join the group: {reason}", writer.dest_path())]
pub struct AddError {
    /// The reason.
    pub reason: Ineligible,
    /// The unchanged writer.
    pub writer: Box<AtomicWriter>,
}

/// A reason why a writer cannot be a member of a group.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ineligible {
    /// It is staged in another directory than the group's first member.
    #[error(
        "it is staged in another directory than the other members; use one directory per group"
    )]
    OtherDirectory,
    /// It is not staged in the directory of its destination.
    #[error("it is not staged in the directory of its destination; open it without `staging_dir`")]
    StagedElsewhere,
    /// A member has the same destination.
    #[error("another member has the same destination; add each destination once")]
    SameDestination,
    /// It was opened with `no_clobber`.
    #[error("a recovery after a crash cannot guarantee `no_clobber`; open it without that option")]
    NoClobber,
    /// It was opened with `replace_only`.
    #[error(
        "a recovery after a crash cannot guarantee `replace_only`; open it without that option"
    )]
    ReplaceOnly,
    /// The file system has no working `flock`.
    #[error(
        "its file system cannot lock files, and recovery could not detect interrupted groups; \
         commit the files one by one"
    )]
    NoLocks,
    /// The destination's name and that of a member refer to the same file, or differ only in case
    /// in a directory that ignores case.
    #[error(
        "the name of another member refers to the same file: the directory ignores \
         case; add each file once"
    )]
    SameFile,
    /// The record of the group would exceed the maximum length that recoveries read.
    #[error("the group has too many members for its record; commit it in parts")]
    TooManyMembers,
    /// The file system stores neither a time of creation nor a file handle, so a recovery could not
    /// detect that a later commit replaced the destination.
    #[error(
        "its file system provides neither a time of creation nor a file handle, and recovery could \
         undo a later commit; commit the files one by one"
    )]
    NoGenerations,
    /// The file system does not keep inode numbers across mounts (FAT, exFAT), or may not (FUSE).
    #[error(
        "its file system may not keep inode numbers, and recovery could not recognize the staged \
         files; commit the files one by one"
    )]
    NoInodeNumbers,
}
