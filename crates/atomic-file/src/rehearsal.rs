//! Trying a commit out before anything is written.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::stage::{Stage, StageName, new_id, stage_name};

/// Why a rehearsal failed.
#[derive(Debug)]
pub(crate) enum RehearsalError {
    /// The commit could not be made.
    Failed(io::Error),
    /// It could, but the file it was tried with stays.
    Left(Leftover),
}

/// Moves an empty file from `staging` to `dest` exactly as the commit will, to learn now whether it can.
///
/// Where both are one directory, what a killed process left of it is removed by the next writer to
/// the same destination.
pub(crate) fn rehearse(
    staging: &Arc<Directory>,
    dest: &Arc<Directory>,
    dest_name: &OsStr,
    no_clobber: bool,
) -> Result<(), RehearsalError> {
    let mut probe = Stage::create(staging, dest_name).map_err(RehearsalError::Failed)?;
    let kind = if probe.is_locked() {
        StageName::Locked
    } else {
        StageName::Unlocked
    };
    let name = stage_name(dest_name, new_id(), kind);
    let published = probe.publish(dest, &name, no_clobber);
    let second_name = published.map_err(|error| RehearsalError::Failed(error.of_rename()))?;
    probe.stands_at(dest, name);
    probe
        .discard()
        .and(second_name.map_or(Ok(()), Err))
        .map_err(RehearsalError::Left)
}
