//! The spare: a file that a commit replaced, kept to be the next stage of the same destination.
//!
//! There is at most one per destination, as it has a name without an ID, `.atomic-file-HASH.spare`, HASH as in a stage's.
//! Whoever takes it may overwrite it at once. Three rules make this safe:
//!
//! 1. A file gets that name only after the sync of the directory that made its replacement durable: no power loss can
//!    bring it back as the destination. Until then it stands under the stage's name, for which the new file was
//!    exchanged, and whoever finds it there takes it for a dead stage and removes it.
//! 2. The name is given without replacing, taken (renamed to a stage's name) and removed only under the file's lock, once it
//!    was seen to mean the locked file. So is the destination's own file before it is exchanged, that nobody takes
//!    it for dead and the name for free in between.
//! 3. It is taken only where it has no other name and nobody else has it open or mapped, which the kernel proves by
//!    granting a lease. Its mode is set before that look: one who might not open the new file can't do so after.
//!
//! A group's record tells by inode number and generation whether a destination was replaced since. So a
//! spare is not taken while a group of whatever user is published or has a ticket: its record may
//! say that this very file is the destination, and would take it for unchanged once it is committed
//! again. A group that shows its ticket later looks at the destination later.
//!
//! A file that a group's record may still name is never exchanged: a recovery would take it for a stage of that group.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{getegid, geteuid};

use crate::directory::{Directory, FileId, stat_of};
use crate::error::Leftover;
use crate::recover;
use crate::staged_file::{Inspection, STAGED_MODE, StagedFile, recycled_name, remove_if_orphaned};
use crate::sys::{self, retry};

/// Makes the spare of `dest`, if there is one and it can be used, a staged file. It has its old bytes and length.
///
/// One that can't be used is removed, unless it is another taker's by now, or no file at all.
pub(crate) fn reuse(dir: &Arc<Directory>, dest: &OsStr, max_bytes: u64) -> Option<StagedFile> {
    let mut recycled = adopt(dir, &recycled_name(dest), OFlag::O_RDWR).ok()??;
    recycled.arm();
    let ready = || -> io::Result<bool> {
        // O_NONBLOCK, which opening asked for, is no matter of `write`, but one of io_uring.
        retry(|| fcntl(recycled.file(), FcntlArg::F_SETFL(OFlag::empty())))?;
        Ok(
            is_like_new(&recycled, max_bytes)? && recover::no_group_in_progress(dir)? && {
                sys::set_mode(recycled.file(), STAGED_MODE)?;
                sys::is_exclusively_open(recycled.file()) && stat_of(recycled.file())?.links == 1
            },
        )
    };
    // Whatever stands in the way, dropping removes the spare, and a new file will do.
    (ready().is_ok_and(|ready| ready) && recycled.move_to_staged_name(dest).is_ok())
        .then_some(recycled)
}

/// Locks the file that `dest` means, to be exchanged; `None` where it can't become a spare.
pub(crate) fn lock_old(dir: &Arc<Directory>, dest: &OsStr, max_bytes: u64) -> Option<StagedFile> {
    let lock = || -> io::Result<Option<StagedFile>> {
        if !sys::supports_leases(dir)? {
            return Ok(None);
        }
        let Some(old) = adopt(dir, dest, OFlag::O_RDONLY)? else {
            return Ok(None);
        };
        // After the file was seen in place: if a group put it there, its record stands until it has no more to say.
        let usable = is_like_new(&old, max_bytes)? && recover::no_trusted_record(dir)?;
        Ok(usable.then_some(old))
    };
    lock().ok()?
}

/// Makes what a commit replaced the spare of `dest`, or removes it.
///
/// Only once the directory is synced, so that it can't come back as the destination.
pub(crate) fn retain(mut old: StagedFile, dest: &OsStr) -> Result<(), Leftover> {
    if !old.is_linked() {
        return remove_replaced(old);
    }
    // That its next writer can open it, and nobody who could not read the destination.
    let private = sys::set_mode(old.file(), STAGED_MODE).is_ok();
    if private && sys::is_exclusively_open(old.file()) && old.move_to(&recycled_name(dest)).is_ok()
    {
        old.disarm();
    }
    old.discard()
}

/// Removes what a commit replaced: the file that was locked, or what somebody put in its place in the last moment.
pub(crate) fn remove_replaced(old: StagedFile) -> Result<(), Leftover> {
    if old.is_linked() {
        return old.discard();
    }
    let (dir, name) = (Arc::clone(old.dir()), old.name().to_owned());
    let path: PathBuf = old.path().clone();
    // Its lock has no more to say, and whoever waits is to hold none.
    drop(old);
    let removed = match dir.entry(&name) {
        // A link, say: nobody else will remove it, and so nobody else can have the name.
        Ok(Some(entry)) if !entry.is_file() => dir.remove(&name),
        Ok(Some(entry)) => remove_stray(&dir, &name, entry.id),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(|source| Leftover { path, source })
}

/// Removes a file that another writer's commit had put in place, and that writer or the next may have locked still: until they let go of it.
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
            // A stage of somebody's by now.
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Removes the spare of `dest`, for a writer who does not recycle.
pub(crate) fn remove(dir: &Directory, dest: &OsStr) {
    // Somebody else's, or no file: not what this writer has to do with.
    let _: Inspection = remove_if_orphaned(dir, &recycled_name(dest));
}

fn adopt(dir: &Arc<Directory>, name: &OsStr, access: OFlag) -> io::Result<Option<StagedFile>> {
    match dir.entry(name)? {
        Some(entry) if entry.is_file() => StagedFile::adopt(dir, name, dir.open_for(access, name)?),
        _ => Ok(None),
    }
}

/// Whether the file is what a new one would be, but for its bytes, length and mode, and is not larger than `max_bytes`.
fn is_like_new(staged: &StagedFile, max_bytes: u64) -> io::Result<bool> {
    /// On a directory: what is created in it gets its group.
    const SET_GROUP_ID: u32 = 0o2000;
    let dir = staged.dir();
    let file = stat_of(staged.file())?;
    let gid = if dir.stat.mode & SET_GROUP_ID == 0 {
        getegid().as_raw()
    } else {
        dir.stat.gid
    };
    Ok(file.is_file()
        && file.links == 1
        && file.allocated <= max_bytes
        && (file.uid, file.gid) == (geteuid().as_raw(), gid)
        && sys::supports_leases(staged.file())?
        && !sys::has_attributes(staged.file())?)
}
