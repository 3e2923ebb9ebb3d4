//! Recycled files: a replaced file that is kept and becomes the next staged file of the same
//! destination.
//!
//! There is at most one per destination: its name, `.atomic-file-HASH.spare`, has no ID. HASH is
//! that of a staged file's name. A writer that takes it may overwrite it at once. Three rules make
//! this safe:
//!
//! 1. A file receives that name only after the sync of the directory that made its replacement
//!    durable: no power loss can restore it as the destination. Until then it has the name of the
//!    staged file for which it was exchanged, and counts as an orphaned staged file.
//! 2. The name is created without replacing. It is renamed or removed only under the file's lock,
//!    after verifying that it refers to the locked file. The destination's file is also locked
//!    before the exchange, so that no sweep removes it and frees the name in between.
//! 3. The file is reused only if it has no other name and no other process has it open or mapped,
//!    which the kernel proves by granting a lease. Its mode is set before that check, so that no
//!    other user can open it afterwards.
//!
//! A group record detects by inode number and generation whether a destination was replaced. A
//! recycled file keeps both. It is therefore not reused while a group of any user is published or
//! holds a ticket: the record may name this very file as the old destination, and would take it for
//! unchanged after it is committed again. A group that creates its ticket later inspects its
//! destinations later.
//!
//! A file that a group record may still name is never exchanged: a recovery would take it for a
//! staged file of that group.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{getegid, geteuid};

use crate::directory::Directory;
use crate::error::Leftover;
use crate::ids::{GroupId, UserId};
use crate::locked_file::LockedFile;
use crate::names::recycled_name;
use crate::orphan::{Inspection, remove_if_orphaned};
use crate::records::no_trusted_record;
use crate::recover::no_group_in_progress;
use crate::retry::retry;
use crate::staged_file::{STAGED_MODE, StagedFile};
use crate::stat::{FileId, stat_of};
use crate::{sys, trace};

/// Reuses the recycled file of `dest`, if it exists and is usable, as a staged file. It keeps its
/// old bytes and length.
///
/// An unusable file is removed, unless another writer has taken it or it is not a regular file.
pub(crate) fn reuse(dir: &Arc<Directory>, dest: &OsStr, max_bytes: u64) -> Option<StagedFile> {
    let name = recycled_name(dest);
    let mut recycled = match lock_file(dir, &name, OFlag::O_RDWR) {
        Ok(recycled) => StagedFile::from(recycled?),
        Err(why) => {
            trace::recycled_file_declined(&dir.path_of(&name), &why);
            return None;
        }
    };
    let check = || -> io::Result<()> {
        // Clear O_NONBLOCK, which was set on open: io_uring honors it for regular files.
        retry(|| fcntl(recycled.file(), FcntlArg::F_SETFL(OFlag::empty())))?;
        check_like_new(dir, recycled.file(), max_bytes)?;
        decline_if(!no_group_in_progress(dir)?, GROUP)?;
        sys::set_mode(recycled.file(), STAGED_MODE)?;
        decline_if(!sys::is_exclusively_open(recycled.file()), IN_USE)?;
        decline_if(stat_of(recycled.file())?.links != 1, LINKS)
    };
    // On any failure fall back to a new file; drop unlinks this one.
    match check().and_then(|()| recycled.move_to_staged_name(dest)) {
        Ok(()) => Some(recycled),
        Err(why) => {
            trace::recycled_file_declined(recycled.path(), &why);
            None
        }
    }
}

/// Locks the file at `dest` for the exchange; `None` if it cannot be recycled.
pub(crate) fn lock_old(dir: &Arc<Directory>, dest: &OsStr, max_bytes: u64) -> Option<LockedFile> {
    let lock = || -> io::Result<Option<LockedFile>> {
        decline_if(!sys::supports_leases(dir)?, LEASES)?;
        let Some(old) = lock_file(dir, dest, OFlag::O_RDONLY)? else {
            return Ok(None);
        };
        // Check this after the lock: if a group renamed the file here, its record exists until the
        // group is complete.
        check_like_new(dir, old.file(), max_bytes)?;
        decline_if(!no_trusted_record(dir)?, GROUP)?;
        Ok(Some(old))
    };
    lock().unwrap_or_else(|why| {
        trace::old_file_not_kept(&dir.path_of(dest), &why);
        None
    })
}

/// Renames a replaced file to the recycled name of `dest`, or removes it.
///
/// The directory must be synced, so that a crash cannot restore the file as the destination.
pub(crate) fn retain(mut old: StagedFile, dest: &OsStr) -> Result<(), Leftover> {
    if !old.is_linked() {
        return remove_replaced(old);
    }
    // The next writer must be able to open it, and no user who could not read the destination.
    let kept = sys::set_mode(old.file(), STAGED_MODE)
        .and_then(|()| decline_if(!sys::is_exclusively_open(old.file()), IN_USE))
        .and_then(|()| old.move_to(&recycled_name(dest)));
    match kept {
        Ok(()) => old.disarm(),
        Err(why) => trace::old_file_not_kept(&old.dir().path_of(dest), &why),
    }
    old.discard()
}

/// Removes a replaced file: the locked one, or another one that replaced it just before the
/// exchange.
pub(crate) fn remove_replaced(old: StagedFile) -> Result<(), Leftover> {
    if old.is_linked() {
        return old.discard();
    }
    let (dir, name) = (Arc::clone(old.dir()), old.name().to_owned());
    let path = old.path().to_owned();
    // Release the lock before waiting for another one.
    drop(old);
    let removed = match dir.entry(&name) {
        // Not a regular file: no other process removes it, so the name cannot change.
        Ok(Some(entry)) if !entry.is_file() => dir.remove(&name),
        Ok(Some(entry)) => remove_stray(&dir, &name, entry.id),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(|source| Leftover { path, source })
}

/// Removes a file that another writer's commit renamed here. That writer or the next one may still
/// hold its lock: wait for the release.
fn remove_stray(dir: &Directory, name: &OsStr, stray: FileId) -> io::Result<()> {
    const TRIES: u32 = 1000;
    const PAUSE: Duration = Duration::from_millis(1);
    for _ in 0..TRIES {
        match remove_if_orphaned(dir, name) {
            Inspection::Removed | Inspection::Missing => return Ok(()),
            Inspection::Retained(error) => return Err(error),
            Inspection::InUse => {}
        }
        if dir.entry(name)?.map(|entry| entry.id) != Some(stray) {
            // The name is another writer's staged file now.
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Removes the recycled file of `dest`, for a writer without recycling.
pub(crate) fn remove(dir: &Directory, dest: &OsStr) {
    // Ignore errors: it may be in use by another writer or not be a file.
    let _: Inspection = remove_if_orphaned(dir, &recycled_name(dest));
}

fn lock_file(dir: &Arc<Directory>, name: &OsStr, access: OFlag) -> io::Result<Option<LockedFile>> {
    match dir.entry(name)? {
        Some(entry) if entry.is_file() => LockedFile::lock(dir, name, dir.open_for(access, name)?),
        _ => Ok(None),
    }
}

const GROUP: &str = "a group commit is in progress or pending in the directory";
const IN_USE: &str = "another process has it open or mapped";
const LEASES: &str = "its file system has no leases, which show whether it is open elsewhere";
const LINKS: &str = "it has other names";

/// Fails with `reason` if `found` is true.
fn decline_if(found: bool, reason: &'static str) -> io::Result<()> {
    match found {
        true => Err(io::Error::other(reason)),
        false => Ok(()),
    }
}

/// Fails unless the file equals a new one except for its bytes, length and mode, and has at most
/// `max_bytes` allocated.
fn check_like_new(dir: &Directory, file: &File, max_bytes: u64) -> io::Result<()> {
    /// On a directory: new files receive its group.
    const SET_GROUP_ID: u32 = 0o2000;
    let stat = stat_of(file)?;
    let gid = if dir.stat.mode & SET_GROUP_ID == 0 {
        GroupId::new(getegid().as_raw())
    } else {
        dir.stat.gid
    };
    decline_if(!stat.is_file(), "it is not a regular file")?;
    decline_if(stat.links != 1, LINKS)?;
    decline_if(
        stat.allocated > max_bytes,
        "it takes more space than may be recycled",
    )?;
    let own = stat.uid.is(UserId::new(geteuid().as_raw())) && stat.gid.is(gid);
    decline_if(!own, "its owner or group is not that of a new file")?;
    decline_if(!sys::supports_leases(file)?, LEASES)?;
    decline_if(
        sys::has_attributes(file)?,
        "it has an access control list or other attributes",
    )
}
