//! Preflight: a check of the commit's system calls before data is written.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::names::{NameKind, new_id, protocol_name};
use crate::staged_file::StagedFile;

/// An error of a preflight.
#[derive(Debug)]
pub(crate) enum PreflightError {
    /// The commit would fail.
    Io(io::Error),
    /// The file of the preflight could not be removed.
    Leftover(Leftover),
}

/// Renames an empty file from `staging` to `dest` with the calls of the commit.
///
/// If both are one directory, the next writer to the same destination removes the file of a killed
/// process.
pub(crate) fn preflight(
    staging: &Arc<Directory>,
    dest: &Arc<Directory>,
    dest_name: &OsStr,
    no_clobber: bool,
) -> Result<(), PreflightError> {
    let mut probe = StagedFile::create(staging, dest_name).map_err(PreflightError::Io)?;
    let kind = if probe.is_locked() {
        NameKind::Locked
    } else {
        NameKind::Unlocked
    };
    let name = protocol_name(dest_name, new_id().map_err(PreflightError::Io)?, kind);
    let published = probe.publish(dest, &name, no_clobber);
    let second_name = published.map_err(|error| PreflightError::Io(error.of_rename()))?;
    probe.moved_to(dest, &name);
    probe
        .discard()
        .and(second_name.map_or(Ok(()), Err))
        .map_err(PreflightError::Leftover)
}
