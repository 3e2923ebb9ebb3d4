//! Trying a commit out before anything is written.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::staged_file::{NameKind, StagedFile, new_id, protocol_name};

/// Why a rehearsal failed.
#[derive(Debug)]
pub(crate) enum PreflightError {
    /// The commit could not be made.
    Io(io::Error),
    /// It could, but the file it was tried with stays.
    Leftover(Leftover),
}

/// Moves an empty file from `staging` to `dest` exactly as the commit will, to learn now whether it can.
///
/// Where both are one directory, what a killed process left of it is removed by the next writer to
/// the same destination.
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
    let name = protocol_name(dest_name, new_id(), kind);
    let published = probe.publish(dest, &name, no_clobber);
    let second_name = published.map_err(|error| PreflightError::Io(error.of_rename()))?;
    probe.moved_to(dest, name);
    probe
        .discard()
        .and(second_name.map_or(Ok(()), Err))
        .map_err(PreflightError::Leftover)
}
