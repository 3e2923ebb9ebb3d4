//! Trying a commit out before anything is written.

use std::ffi::OsStr;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::sync::Arc;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::stage::{SLOTS, Stage, StageName, at_free_slot, stage_name};

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
/// With `no_clobber` to the first free slot but the one that the writer's own stage is about to have: what a killed rehearsal
/// left there is removed on the way. Without, what stood at the name would be replaced, a living writer's stage too: so the
/// name is one that nobody else has, and what is left there is for sweepers.
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
    let published = if no_clobber {
        let publish = |name: &OsStr| probe.publish(dest, name, true);
        at_free_slot(dest, dest_name, kind, 1, publish)
    } else {
        let random = RandomState::new().build_hasher().finish() | SLOTS;
        let name = stage_name(dest_name, random, kind);
        let left = probe.publish(dest, &name, false);
        left.map(|left| (name, left))
    };
    let (name, second_name) =
        published.map_err(|error| RehearsalError::Failed(error.of_rename()))?;
    probe.stands_at(dest, name);
    probe
        .discard()
        .and(second_name.map_or(Ok(()), Err))
        .map_err(RehearsalError::Left)
}
