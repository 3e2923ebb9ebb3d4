//! The state of a group's members, and their renames.

use std::ffi::OsStr;
use std::io;

use crate::directory::Directory;
use crate::error::RecoverError;
use crate::ids::UserId;
use crate::record::{Member, Old};
use crate::rename::{PublishError, confirm_rename};
use crate::stat::{FROM_HANDLE, Stat};

pub(super) enum MemberState {
    Staged,
    InPlace,
    Superseded,
    /// The staged file is missing, and the destination is the old file.
    Lost,
}

/// Returns the state of a member of a record that belongs to the user `owner`.
pub(super) fn member_state(
    dir: &Directory,
    record: &OsStr,
    owner: UserId,
    member: &Member,
) -> Result<MemberState, RecoverError> {
    let inspect = |name: &OsStr| {
        let path = dir.path_of(name);
        move |source| RecoverError::Io {
            operation: "inspect",
            path,
            source,
        }
    };
    let entry = |name: &OsStr| dir.entry(name).map_err(inspect(name));
    let dest = entry(&member.dest)?;
    if dest.is_some_and(|dest| dest.id.inode == member.inode) {
        return Ok(MemberState::InPlace);
    }
    if dest.is_some_and(|dest| dest.is_dir()) {
        return Err(RecoverError::DestinationIsDirectory {
            dest: dir.path_of(&member.dest),
            record: dir.path_of(record),
        });
    }
    match entry(&member.staged)? {
        // A sweep keeps it while the record exists. It was renamed, and the destination then
        // replaced or removed; or another program removed it.
        None if member.old == Old::Unknown => return Ok(MemberState::Superseded),
        None => {
            let now = old_file(dir, &member.dest).map_err(inspect(&member.dest))?;
            return match is_same_generation(member.old, now).map_err(inspect(&member.dest))? {
                true => Ok(MemberState::Lost),
                false => Ok(MemberState::Superseded),
            };
        }
        Some(staged)
            if staged.is_file()
                && (staged.id.inode, staged.size) == (member.inode, member.size) => {}
        // In a copied directory, no inode number matches the record.
        Some(_) => {
            return Err(RecoverError::StageChanged {
                stage: dir.path_of(&member.staged),
                dest: dir.path_of(&member.dest),
                record: dir.path_of(record),
            });
        }
    }
    let replaced_since = match (dest, member.old) {
        // There is no commit to undo, or no record of the old file.
        (None, _) | (_, Old::Unknown) => false,
        (Some(_), old) => {
            let now = old_file(dir, &member.dest).map_err(inspect(&member.dest))?;
            !is_same_generation(old, now).map_err(inspect(&member.dest))?
        }
    };
    match dest {
        // Another user may have created it to make recovery drop the staged file: do not treat it
        // as a commit.
        Some(dest) if replaced_since && is_foreign(&dest, owner) => {
            Err(RecoverError::DestinationTaken {
                dest: dir.path_of(&member.dest),
                owner: dest.uid.raw(),
                record: dir.path_of(record),
            })
        }
        _ if replaced_since => Ok(MemberState::Superseded),
        _ => Ok(MemberState::Staged),
    }
}

/// Returns whether a file belongs to a user other than `owner` and root.
pub(crate) fn is_foreign(file: &Stat, owner: UserId) -> bool {
    !file.uid.is_any_of(&[owner, UserId::ROOT])
}

/// Returns the identity of a destination's old file, for the record.
pub(crate) fn old_file(dir: &Directory, dest: &OsStr) -> io::Result<Old> {
    let Some(entry) = dir.entry(dest)? else {
        return Ok(Old::Nothing);
    };
    match dir.generation(dest) {
        Ok(generation) => Ok(Old::File {
            inode: entry.id.inode,
            generation,
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Old::Nothing),
        Err(error) => Err(error),
    }
}

/// Returns whether the destination, which is `now`, is still the `recorded` file.
///
/// # Errors
/// Fails if the inode numbers are equal and the generations cannot be compared: they are of
/// different kinds, or this process cannot read one. A sandbox may forbid one of the system calls.
fn is_same_generation(recorded: Old, now: Old) -> io::Result<bool> {
    let (
        Old::File { inode, generation },
        Old::File {
            inode: inode_now,
            generation: generation_now,
        },
    ) = (recorded, now)
    else {
        return Ok(recorded == now);
    };
    if inode != inode_now {
        return Ok(false);
    }
    // A record of version 2 without a generation: the inode number is all that it has.
    if generation == 0 {
        return Ok(true);
    }
    let is_digest = |generation: u64| generation & FROM_HANDLE != 0;
    if generation_now == 0 || is_digest(generation) != is_digest(generation_now) {
        return Err(io::Error::other(
            "the system does not report which generation of the file this is: recover in a \
             process that may call statx and name_to_handle_at",
        ));
    }
    Ok(generation == generation_now)
}

/// Renames one member of a published group to its destination.
pub(crate) fn rename_member(dir: &Directory, member: &Member) -> Result<(), PublishError> {
    let is_at = |name: &OsStr| {
        dir.entry(name)
            .map(|entry| entry.is_some_and(|entry| entry.id.inode == member.inode))
    };
    confirm_rename(
        || dir.rename(&member.staged, dir, &member.dest),
        || is_at(&member.dest),
        || is_at(&member.staged).is_ok_and(|here| here),
    )
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const TIME: u64 = 1_700_000_000_000_000_000;
    const DIGEST: u64 = FROM_HANDLE | 7;

    fn file(inode: u64, generation: u64) -> Old {
        Old::File { inode, generation }
    }

    /// `None` if it cannot be determined: recovery must then change nothing.
    #[rstest]
    #[case::same_time(file(1, TIME), file(1, TIME), Some(true))]
    #[case::another_time(file(1, TIME), file(1, TIME + 1), Some(false))]
    #[case::same_digest(file(1, DIGEST), file(1, DIGEST), Some(true))]
    #[case::another_digest(file(1, DIGEST), file(1, DIGEST + 1), Some(false))]
    #[case::another_inode(file(1, TIME), file(2, 0), Some(false))]
    #[case::time_and_digest(file(1, TIME), file(1, DIGEST), None)]
    #[case::digest_and_time(file(1, DIGEST), file(1, TIME), None)]
    #[case::time_is_not_reported(file(1, TIME), file(1, 0), None)]
    #[case::digest_is_not_reported(file(1, DIGEST), file(1, 0), None)]
    #[case::version_2_without_a_time(file(1, 0), file(1, DIGEST), Some(true))]
    #[case::removed(file(1, TIME), Old::Nothing, Some(false))]
    #[case::created(Old::Nothing, file(1, TIME), Some(false))]
    #[case::still_missing(Old::Nothing, Old::Nothing, Some(true))]
    fn generations_of_different_kinds_are_not_compared(
        #[case] recorded: Old,
        #[case] now: Old,
        #[case] same: Option<bool>,
    ) {
        assert_eq!(is_same_generation(recorded, now).ok(), same);
    }
}
