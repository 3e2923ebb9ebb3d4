//! Trying a commit out before anything is written.

use std::ffi::OsStr;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::sync::Arc;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::outcome::PublishError;
use crate::stage::{SLOTS, Stage, StageName, stage_name};

/// Why a rehearsal failed.
#[derive(Debug)]
pub(crate) enum RehearsalError {
    /// The commit could not be made.
    Failed(io::Error),
    /// It could, but the file it was tried with stays.
    Left(Leftover),
}

/// Moves an empty file from `staging` to `dest` exactly as the commit will, to learn now whether it can.
pub(crate) fn rehearse(
    staging: &Arc<Directory>,
    dest: &Arc<Directory>,
    dest_name: &OsStr,
    no_clobber: bool,
) -> Result<(), RehearsalError> {
    let mut probe = Stage::create(staging, dest_name).map_err(RehearsalError::Failed)?;
    // No slot: nothing may stand at the name, as without `no_clobber` it would be replaced.
    let random = RandomState::new().build_hasher().finish() | SLOTS;
    let kind = if probe.is_locked() {
        StageName::Locked
    } else {
        StageName::Unlocked
    };
    let name = stage_name(dest_name, random, kind);
    let second_name = match probe.publish(dest, &name, no_clobber) {
        Ok(left) => left,
        Err(PublishError::Not(error) | PublishError::Unknown { rename: error, .. }) => {
            return Err(RehearsalError::Failed(error));
        }
    };
    probe.stands_at(dest, name);
    probe
        .discard()
        .and(second_name.map_or(Ok(()), Err))
        .map_err(RehearsalError::Left)
}
