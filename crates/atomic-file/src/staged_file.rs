//! Staged files: creation, locking, renaming and removal.
//!
//! # Names and locks
//! The name of a staged file is `.atomic-file-HASH-ID.stage`. HASH is the CRC-32 of the
//! destination's name, so that the name has a fixed length. ID is 16 random hexadecimal digits, so
//! that no other user can predict and occupy the name. `open` lists the directory and removes the
//! orphaned staged files of its own destination.
//!
//! A writer holds the `flock` of its staged file from just after its creation until it is renamed
//! or removed. The mode is 0600 until all bytes are synced, so that no other user can open the file
//! and hold its lock. The commit then sets the final mode and owner, and syncs the file again. Two
//! rules close the gap between creating and locking:
//!
//! 1. After locking the file, its creator verifies that the name still refers to it, and chooses
//!    another name if not. If the file is already locked, the creator waits: a sweeper holds the
//!    lock briefly, and keeps the file if a record names it.
//! 2. A staged file is unlinked only under its lock: by its writer, or by a sweeper. The sweeper
//!    verifies, *after* locking, first that no published group record names the file and then that
//!    the name still refers to the locked file.
//!
//! A file that a commit [exchanged](StagedFile::exchange) for its staged file has the staged file's
//! name and is locked by that commit. `recycle.rs` describes the next steps.
//!
//! Only the holder of the lock can change what a name refers to, so a sweeper's last check holds
//! until it unlinks the file. A writer that died publishes no more records, which is why the
//! sweeper checks the records first.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::directory::{Directory, FileId, Stat, stat_of};
use crate::error::Leftover;
use crate::recover::Records;
use crate::rename::{PublishError, confirm_rename, has_no_such_call};
use crate::sweep::sweep_names;
use crate::sys::{Lock, Unlock, file_owner, try_lock};

pub(crate) const PREFIX: &str = ".atomic-file-";
const LOCKED: &str = ".stage";
/// For file systems without locks: whether the writer is running cannot be determined.
const UNLOCKED: &str = ".unlocked-stage";
/// One per destination, so without an ID: see `recycle.rs`.
const RECYCLED: &str = ".spare";
/// The unpublished record of a group: see `ticket.rs`.
const TICKET: &str = ".intent";

/// The mode of every staged file until the commit: no other user can open it.
pub(crate) const STAGED_MODE: u32 = 0o600;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameKind {
    Locked,
    Unlocked,
    Recycled,
    Ticket,
}

/// Returns a random ID, which other processes cannot predict.
pub(crate) fn new_id() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Returns whether `text` is an ID of [`new_id`] in hexadecimal digits.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 16 && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    let is_digit = |digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    !text.is_empty() && text.bytes().all(is_digit)
}

/// Returns the kind of a name that this module creates; `None` for other names.
pub(crate) fn kind_of_name(name: &OsStr) -> Option<NameKind> {
    let rest = name.to_str()?.strip_prefix(PREFIX)?;
    if let Some(id) = rest.strip_suffix(TICKET) {
        return is_id(id).then_some(NameKind::Ticket);
    }
    if let Some(hash) = rest.strip_suffix(RECYCLED) {
        return (hash.len() == 8 && is_hex(hash)).then_some(NameKind::Recycled);
    }
    let (rest, kind) = if let Some(rest) = rest.strip_suffix(UNLOCKED) {
        (rest, NameKind::Unlocked)
    } else {
        (rest.strip_suffix(LOCKED)?, NameKind::Locked)
    };
    let (hash, id) = rest.split_once('-')?;
    // Earlier versions used a counter with a variable number of digits.
    (hash.len() == 8 && is_hex(hash) && id.len() <= 16 && is_hex(id)).then_some(kind)
}

pub(crate) fn protocol_name(dest: &OsStr, id: u64, kind: NameKind) -> OsString {
    let hash = crc32fast::hash(dest.as_bytes());
    match kind {
        NameKind::Locked => format!("{PREFIX}{hash:08x}-{id:016x}{LOCKED}"),
        NameKind::Unlocked => format!("{PREFIX}{hash:08x}-{id:016x}{UNLOCKED}"),
        NameKind::Recycled => format!("{PREFIX}{hash:08x}{RECYCLED}"),
        NameKind::Ticket => format!("{PREFIX}{id:016x}{TICKET}"),
    }
    .into()
}

/// Returns whether `name` is that of a file staged for `dest`, or for another destination with the
/// same hash.
fn is_stage_of(dest: &OsStr, name: &OsStr) -> bool {
    let hash = format!("{PREFIX}{:08x}-", crc32fast::hash(dest.as_bytes()));
    kind_of_name(name) == Some(NameKind::Locked) && name.as_bytes().starts_with(hash.as_bytes())
}

/// Removes the orphaned staged files of `dest` among the `names` in `dir`.
///
/// A writer that preserves the owner may have changed it to `dest_owner`, the owner of the
/// destination. Files of other users are not opened, because this writer must not remove them.
pub(crate) fn remove_leftovers(
    dir: &Directory,
    dest: &OsStr,
    dest_owner: Option<u32>,
    names: &[OsString],
) {
    let owners = [Some(file_owner()), dest_owner];
    let ours = |name: &OsStr| {
        let entry = dir.entry(name).ok().flatten();
        entry.is_some_and(|entry| owners.contains(&Some(entry.uid)))
    };
    let leftovers: Vec<_> = names
        .iter()
        .filter(|name| is_stage_of(dest, name) && ours(name))
        .map(|name| (name, NameKind::Locked))
        .collect();
    if !leftovers.is_empty() {
        // Files that remain do not affect writers. A sweep reports them.
        let _ = sweep_names(dir, &leftovers, true);
    }
}

pub(crate) fn recycled_name(dest: &OsStr) -> OsString {
    protocol_name(dest, 0, NameKind::Recycled)
}

/// The result of inspecting a staged file that may be orphaned.
#[derive(Debug)]
pub(crate) enum Inspection {
    Removed,
    Missing,
    InUse,
    Retained(io::Error),
}

/// Removes the staged file `name` if it is orphaned. Never waits, and never changes a file that is
/// in use.
pub(crate) fn remove_if_orphaned(dir: &Directory, name: &OsStr) -> Inspection {
    let orphan = match Orphan::lock(dir, name) {
        Ok(orphan) => orphan,
        Err(inspected) => return inspected,
    };
    let mut records = Records::default();
    let looked = stat_of(&orphan.file).and_then(|stat| records.refresh(dir, Some(stat.uid)));
    match looked {
        Ok(()) => orphan.resolve(dir, name, &records, true),
        Err(error) => Inspection::Retained(error),
    }
}

fn or_retained(result: io::Result<Inspection>) -> Inspection {
    match result {
        Ok(inspected) => inspected,
        Err(error) if error.kind() == ErrorKind::NotFound => Inspection::Missing,
        Err(error) => Inspection::Retained(error),
    }
}

/// A staged file that was not locked by its writer, locked until this is dropped.
#[derive(Debug)]
pub(crate) struct Orphan {
    file: File,
}

impl Drop for Orphan {
    fn drop(&mut self) {
        drop(Unlock(&self.file));
    }
}

impl Orphan {
    /// Locks the staged file `name`, or returns why it must not be removed.
    pub(crate) fn lock(dir: &Directory, name: &OsStr) -> Result<Self, Inspection> {
        let attempt = || {
            match dir.entry(name)? {
                None => return Ok(Err(Inspection::Missing)),
                Some(entry) if !entry.is_file() => {
                    return Ok(Err(retained(
                        "has the name of a staged file, but is not a regular \
                         file",
                    )));
                }
                Some(_) => {}
            }
            let file = dir.open_file(name)?;
            Ok(match try_lock(&file)? {
                Lock::Held => Ok(Self { file }),
                Lock::Taken => Err(Inspection::InUse),
                Lock::Unsupported(error) => Err(Inspection::Retained(error)),
            })
        };
        attempt().unwrap_or_else(|error| Err(or_retained(Err(error))))
    }

    /// Removes the staged file if `remove` is set, and returns the result that removing it has or
    /// would have. `records` must have been refreshed since the file was locked.
    pub(crate) fn resolve(
        self,
        dir: &Directory,
        name: &OsStr,
        records: &Records,
        remove: bool,
    ) -> Inspection {
        let attempt = || -> io::Result<Inspection> {
            let stat = stat_of(&self.file)?;
            if records.name(name, stat.uid) {
                return Ok(retained(
                    "a group commit that names it is pending in the directory: call `recover`",
                ));
            }
            if dir.entry(name)?.map(|entry| entry.id) != Some(stat.id) {
                return Ok(Inspection::Missing);
            }
            if remove {
                dir.remove(name)?;
            }
            Ok(Inspection::Removed)
        };
        or_retained(attempt())
    }
}

fn retained(reason: &'static str) -> Inspection {
    Inspection::Retained(io::Error::other(reason))
}

/// Locks a file that was just created. A sweeper may hold the lock briefly; it will release or
/// unlink.
fn lock_new(file: &File) -> io::Result<Lock> {
    const TRIES: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(1);
    for _ in 0..TRIES {
        match try_lock(file)? {
            Lock::Taken => thread::sleep(PAUSE),
            answered => return Ok(answered),
        }
    }
    Ok(Lock::Taken)
}

#[derive(Debug)]
pub(crate) struct StagedFile {
    dir: Arc<Directory>,
    name: OsString,
    path: PathBuf,
    file: File,
    id: FileId,
    locked: bool,
    /// Whether `name` belongs to this object, so that drop removes it.
    unlink_on_drop: bool,
}

impl StagedFile {
    /// Creates an empty staged file of mode 0600 for the destination name `dest`.
    pub(crate) fn create(dir: &Arc<Directory>, dest: &OsStr) -> io::Result<Self> {
        let mut kind = NameKind::Locked;
        loop {
            let name = protocol_name(dest, new_id(), kind);
            let file = match dir.create_new(&name) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    // The name is random: this process created the file, and the reply was lost.
                    let _: Inspection = remove_if_orphaned(dir, &name);
                    continue;
                }
                Err(error) => {
                    // Over NFS the reply may have been lost and the file exist. It is not locked,
                    // so it is orphaned.
                    let _: Inspection = remove_if_orphaned(dir, &name);
                    return Err(error);
                }
            };
            // The file's identity is unknown only here. Its name was just created, so it refers to
            // it.
            let id = stat_of(&file).inspect_err(|_| drop(dir.remove(&name)))?.id;
            let mut staged = Self {
                dir: Arc::clone(dir),
                path: dir.path_of(&name),
                name,
                id,
                file,
                locked: false,
                unlink_on_drop: true,
            };
            if kind == NameKind::Unlocked {
                return Ok(staged);
            }
            match lock_new(&staged.file)? {
                Lock::Held if staged.check_linked()? => {
                    staged.locked = true;
                    return Ok(staged);
                }
                // A sweeper locked the file first, or another program holds the lock: the name no
                // longer belongs to this writer.
                Lock::Held | Lock::Taken => staged.unlink_on_drop = false,
                // Dropping the staged file removes it.
                Lock::Unsupported(_) => kind = NameKind::Unlocked,
            }
        }
    }

    /// Locks an existing file, which was opened by `name`, as a staged file. Returns `None` if
    /// another process holds the lock or the name refers to another file by now. Drop keeps the
    /// name until [`arm`](Self::arm) is called.
    pub(crate) fn adopt(
        dir: &Arc<Directory>,
        name: &OsStr,
        file: File,
    ) -> io::Result<Option<Self>> {
        if !matches!(try_lock(&file)?, Lock::Held) {
            return Ok(None);
        }
        let staged = Self {
            dir: Arc::clone(dir),
            path: dir.path_of(name),
            name: name.to_owned(),
            id: stat_of(&file)?.id,
            file,
            locked: true,
            unlink_on_drop: false,
        };
        Ok(staged.check_linked()?.then_some(staged))
    }

    /// Makes drop remove the file's name.
    pub(crate) fn arm(&mut self) {
        self.unlink_on_drop = true;
    }

    /// Renames the file within its directory to a new staged name for `dest`.
    pub(crate) fn move_to_staged_name(&mut self, dest: &OsStr) -> io::Result<()> {
        self.move_to(&protocol_name(dest, new_id(), NameKind::Locked))
    }

    /// Renames the file within its directory to the random name `name`.
    pub(crate) fn rename_to(&mut self, name: OsString) -> Result<(), PublishError> {
        let dir = Arc::clone(&self.dir);
        self.publish(&dir, &name, false)?;
        self.moved_to(&dir, name);
        Ok(())
    }

    /// Renames the file within its directory to `name`, which must not exist.
    pub(crate) fn move_to(&mut self, name: &OsStr) -> io::Result<()> {
        let dir = Arc::clone(&self.dir);
        self.attempt(&dir, name, |from, own| from.rename_new(own, &dir, name))
            .map_err(PublishError::of_rename)?;
        self.path = dir.path_of(name);
        self.name = name.to_owned();
        Ok(())
    }

    /// Exchanges the staged file with `old`, which is in the same directory. Returns `old` as the
    /// owner of the staged file's name. This object gives up its name.
    ///
    /// The name may refer to a file other than `old`, if that was replaced just before the call.
    /// [`is_linked`](Self::is_linked) detects this.
    pub(crate) fn exchange(&mut self, mut old: Self) -> Result<Self, PublishError> {
        let (dir, dest) = (Arc::clone(&self.dir), old.name.clone());
        self.attempt(&dir, &dest, |_, own| dir.exchange(own, &dest))?;
        self.unlink_on_drop = false;
        // The destination became a directory just before the call, which rename(2) would have
        // refused.
        if let Ok(Some(there)) = dir.entry(&self.name)
            && there.is_dir()
        {
            let is_dir = || io::Error::from(ErrorKind::IsADirectory);
            return Err(match dir.exchange(&self.name, &dest) {
                Ok(()) => {
                    self.unlink_on_drop = true;
                    PublishError::NotPublished(is_dir())
                }
                Err(errno) => PublishError::Unknown {
                    rename: is_dir(),
                    look: errno.into(),
                },
            });
        }
        old.path.clone_from(&self.path);
        old.name.clone_from(&self.name);
        old.unlink_on_drop = true;
        Ok(old)
    }

    pub(crate) fn dir(&self) -> &Arc<Directory> {
        &self.dir
    }

    pub(crate) fn name(&self) -> &OsStr {
        &self.name
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn file_mut(&mut self) -> &mut File {
        &mut self.file
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.locked
    }

    /// Returns whether the name still refers to this file. Errors count as `false`.
    pub(crate) fn is_linked(&self) -> bool {
        self.check_linked().is_ok_and(|ours| ours)
    }

    fn check_linked(&self) -> io::Result<bool> {
        Ok(self.dir.entry(&self.name)?.map(|entry| entry.id) == Some(self.id))
    }

    /// Fails unless both the descriptor and the name still refer to the file that was created.
    pub(crate) fn check(&self) -> io::Result<Stat> {
        let stat = stat_of(&self.file)?;
        if stat.id != self.id {
            return Err(io::Error::other(
                "the writer's `File` was replaced by another one",
            ));
        }
        if !self.check_linked()? {
            return Err(io::Error::new(
                ErrorKind::NotFound,
                "another program removed or replaced the staged file",
            ));
        }
        Ok(stat)
    }

    /// Renames the staged file to `name` in `dir`. Replaces an existing file unless `no_clobber` is
    /// set.
    ///
    /// `Ok` means that `name` refers to the staged file. It contains a [`Leftover`] if the staged
    /// file's old name remains.
    pub(crate) fn publish(
        &mut self,
        dir: &Directory,
        name: &OsStr,
        no_clobber: bool,
    ) -> Result<Option<Leftover>, PublishError> {
        if !no_clobber {
            self.attempt(dir, name, |from, own| from.rename(own, dir, name))?;
            self.unlink_on_drop = false;
            return Ok(None);
        }
        match self.attempt(dir, name, |from, own| from.rename_new(own, dir, name)) {
            Ok(()) => {
                self.unlink_on_drop = false;
                Ok(None)
            }
            Err(PublishError::NotPublished(error)) if has_no_such_call(&error) => {
                let link = || self.dir.link(&self.name, dir, name);
                // The old name exists in any case, so it does not show whether the link was made.
                confirm_rename(link, || self.is_at(dir, name), || false)?;
                Ok(self.remove().err())
            }
            Err(error) => Err(error),
        }
    }

    fn attempt(
        &self,
        dir: &Directory,
        name: &OsStr,
        call: impl Fn(&Directory, &OsStr) -> nix::Result<()>,
    ) -> Result<(), PublishError> {
        let moved = || call(&self.dir, &self.name);
        confirm_rename(moved, || self.is_at(dir, name), || self.is_linked())
    }

    fn is_at(&self, dir: &Directory, name: &OsStr) -> io::Result<bool> {
        let Some(entry) = dir.entry(name)? else {
            return Ok(false);
        };
        let own = stat_of(&self.file)?;
        Ok((entry.id, entry.size) == (own.id, own.size))
    }

    /// Records that the file was renamed to `name` in `dir`, and makes drop remove that name.
    pub(crate) fn moved_to(&mut self, dir: &Arc<Directory>, name: OsString) {
        self.dir = Arc::clone(dir);
        self.path = dir.path_of(&name);
        self.name = name;
        self.unlink_on_drop = true;
    }

    /// Makes drop keep the file's name, for a recovery.
    pub(crate) fn disarm(&mut self) {
        self.unlink_on_drop = false;
    }

    /// Removes the staged file.
    pub(crate) fn discard(mut self) -> Result<(), Leftover> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), Leftover> {
        if !std::mem::take(&mut self.unlink_on_drop) {
            return Ok(());
        }
        let removed = match self.check_linked() {
            // Another program replaced the staged file: the name is not this writer's any more.
            Ok(false) => Ok(()),
            // If the check fails, rely on the protocol: this writer holds the lock.
            Ok(true) | Err(_) => self.dir.remove(&self.name),
        };
        removed.map_err(|source| Leftover {
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // `discard` reports errors. A sweep removes a file that remains.
        let _ = self.remove();
        if self.locked {
            drop(Unlock(&self.file));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn protocol_names_are_short_and_recognised(
            dest in proptest::collection::vec(1u8.., 1..=255),
            id: u64,
            kind in prop_oneof![
                Just(NameKind::Locked), Just(NameKind::Unlocked), Just(NameKind::Recycled),
                Just(NameKind::Ticket),
            ],
        ) {
            let name = protocol_name(OsStr::from_bytes(&dest), id, kind);
            prop_assert_eq!(kind_of_name(&name), Some(kind));
            prop_assert!(name.len() <= 64);
        }
    }

    #[rstest::rstest]
    #[case("")]
    #[case("memory.bin")]
    #[case(".atomic-file-group")]
    #[case(".atomic-file-.stage")]
    #[case(".atomic-file-0123456-0.stage")]
    #[case(".atomic-file-01234567-.stage")]
    #[case(".atomic-file-01234567-0.stage~")]
    #[case(".atomic-file-0123456G-0.stage")]
    #[case(".atomic-file-01234567-00000000000000000.stage")]
    #[case("x.atomic-file-01234567-0.stage")]
    #[case(".atomic-file-0123456.spare")]
    #[case(".atomic-file-0123456G.spare")]
    #[case(".atomic-file-01234567-0.spare")]
    #[case(".atomic-file-01234567.intent")]
    #[case(".atomic-file-0123456789abcdef.group")]
    fn other_names_are_not_recognised(#[case] name: &str) {
        assert_eq!(kind_of_name(OsStr::new(name)), None);
    }
}
