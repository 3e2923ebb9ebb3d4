//! Trying a commit out before anything is written.

use std::ffi::OsStr;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, ErrorKind};
use std::sync::Arc;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::outcome::PublishError;
use crate::stage::{SLOTS, Stage, StageName, is_freed, stage_name};

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
/// With `no_clobber` to the first free slot but the one that the writer's own stage is about to have: what a killed rehearsal left there is removed on
/// the way. Without, what stood at the name would be replaced, a living writer's stage too: so the name is one that nobody else has, and what is left there is for sweepers.
pub(crate) fn rehearse(
    staging: &Arc<Directory>,
    dest: &Arc<Directory>,
    dest_name: &OsStr,
    no_clobber: bool,
) -> Result<(), RehearsalError> {
    let mut probe = Stage::create(staging, dest_name).map_err(RehearsalError::Failed)?;
    let mut slot = match no_clobber {
        true => 1,
        false => RandomState::new().build_hasher().finish() | SLOTS,
    };
    let kind = if probe.is_locked() {
        StageName::Locked
    } else {
        StageName::Unlocked
    };
    let (name, second_name) = loop {
        let name = stage_name(dest_name, slot, kind);
        match probe.publish(dest, &name, no_clobber) {
            Ok(left) => break (name, left),
            Err(PublishError::Not(error))
                if error.kind() == ErrorKind::AlreadyExists && slot < SLOTS =>
            {
                slot += u64::from(kind == StageName::Unlocked || !is_freed(dest, &name));
            }
            Err(PublishError::Not(error) | PublishError::Unknown { rename: error, .. }) => {
                return Err(RehearsalError::Failed(error));
            }
        }
    };
    probe.stands_at(dest, name);
    probe
        .discard()
        .and(second_name.map_or(Ok(()), Err))
        .map_err(RehearsalError::Left)
}
