//! A staged file: created, locked, moved into place or removed.
//!
//! # Names and locks
//! A staged file is called `.atomic-file-HASH-ID.stage`: HASH is the CRC-32 of the destination's
//! name, so that the name has a fixed length, and ID is 16 random
//! hexadecimal digits. No other user can predict a name, and so none can occupy it. A writer lists
//! the directory when it is opened, and removes the orphaned staged files of its own destination.
//!
//! A writer holds the `flock` of its staged file from just after its creation until it is in place
//! or removed. The mode is 0600 until all bytes are synced, so no other user can open the file to
//! hold its lock; then it gets the mode and the owner that it is to have, and is synced again.
//! Two rules make this safe in the moment between creating and locking:
//!
//! 1. A creator that got the lock looks whether the name still means its file, and takes another
//!    name if not. One that did not get it waits: a sweeper has it for a moment, and leaves the file
//!    where a record names it.
//! 2. A staged file is unlinked only under its lock: by its owner, or by a sweeper that, *after*
//!    getting the lock, has seen that no published group record names the file and then that the
//!    name still means the locked file.
//!
//! What a commit [exchanged](Stage::exchange) for its staged file stands under the staged file's
//! name, locked by that commit; `spare.rs` describes what becomes of it.
//!
//! So a name can change its meaning only through the holder of the lock, and a sweeper's last look
//! stays true until it unlinks. An owner that has died publishes no record any more, hence the order
//! of a sweeper's looks.

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
/// For file systems without locks: nobody can tell whether the owner of such a stage lives.
const UNLOCKED: &str = ".unlocked-stage";
/// One per destination, so without an ID: see `spare.rs`.
const RECYCLED: &str = ".spare";
/// A group's record that is not published: see `turn.rs`.
const TICKET: &str = ".intent";

/// The mode of every staged file until it is committed: readable and writable by its owner,
/// independent of the mode it is to get, and not to be opened by anyone else.
pub(crate) const STAGED_MODE: u32 = 0o600;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameKind {
    Locked,
    Unlocked,
    Recycled,
    Ticket,
}

/// Random digits of a name, which no other process guesses.
pub(crate) fn new_id() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Whether `text` is an ID as [`new_id`] makes them, written out.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 16 && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    let is_digit = |digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    !text.is_empty() && text.bytes().all(is_digit)
}

/// Whether `name` is one that this module gives to stages and spares.
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
    // Earlier versions counted, in as many digits as it took.
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

/// Whether `name` is that of a file staged for `dest`, or for another destination of the same hash.
fn is_stage_of(dest: &OsStr, name: &OsStr) -> bool {
    let hash = format!("{PREFIX}{:08x}-", crc32fast::hash(dest.as_bytes()));
    kind_of_name(name) == Some(NameKind::Locked) && name.as_bytes().starts_with(hash.as_bytes())
}

/// Removes what killed writers to `dest` left, of the `names` in `dir`.
///
/// A writer that preserves the owner may have given its file to the destination's, `dest_owner`. Other
/// users' files are not opened: they are not this writer's to remove.
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
        // What stays is for sweepers, and in no writer's way.
        let _ = sweep_names(dir, &leftovers, true);
    }
}

pub(crate) fn recycled_name(dest: &OsStr) -> OsString {
    protocol_name(dest, 0, NameKind::Recycled)
}

/// What became of a stage that may be dead.
#[derive(Debug)]
pub(crate) enum Inspection {
    Removed,
    Missing,
    InUse,
    Retained(io::Error),
}

/// Removes the stage `name` if its owner is dead. Never waits, and never touches a living one.
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

/// A staged file that no one had locked, locked until this is dropped.
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
    /// Locks the staged file `name`, or says why that is not to be removed.
    pub(crate) fn lock(dir: &Directory, name: &OsStr) -> Result<Self, Inspection> {
        let attempt = || {
            match dir.entry(name)? {
                None => return Ok(Err(Inspection::Missing)),
                Some(entry) if !entry.is_file() => {
                    return Ok(Err(retained("has a stage's name, but is no regular file")));
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

    /// Says what became of the staged file, or would become of it if it was to be removed. `records`
    /// must have been looked for since it was locked.
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

/// Locks a file that was just created. Who has its lock already is about to see that it's no stage of a dead owner, or removes it.
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
    /// Whether `name` is ours to remove.
    unlink_on_drop: bool,
}

impl StagedFile {
    /// Stages an empty file, mode 0600, for a destination called `dest`.
    pub(crate) fn create(dir: &Arc<Directory>, dest: &OsStr) -> io::Result<Self> {
        let mut kind = NameKind::Locked;
        loop {
            let name = protocol_name(dest, new_id(), kind);
            let file = match dir.create_new(&name) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    // The name is random: it is ours, and the answer that it was created was lost.
                    let _: Inspection = remove_if_orphaned(dir, &name);
                    continue;
                }
                Err(error) => {
                    // Over NFS the answer may have been lost, and the file be there. Whoever sweeps it takes it for a dead one.
                    let _: Inspection = remove_if_orphaned(dir, &name);
                    return Err(error);
                }
            };
            // The one failure after which our file has no identity yet: it is a moment old, and its name still means it.
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
                // A sweeper was faster than our lock: what is at the name, if anything, is not ours to remove. Nor is what somebody
                // holds who is no sweeper.
                Lock::Held | Lock::Taken => staged.unlink_on_drop = false,
                // Dropping the stage removes it.
                Lock::Unsupported(_) => kind = NameKind::Unlocked,
            }
        }
    }

    /// Locks a file that is there already, opened by `name`, as if it were a stage; `None` where somebody else holds the lock or
    /// the name means another file by now. Its name stays until [`own_name`](Self::own_name) makes it this stage's own.
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

    /// From here on dropping removes the file's name.
    pub(crate) fn arm(&mut self) {
        self.unlink_on_drop = true;
    }

    /// Renames the file within its directory, to a new name of a file staged for `dest`.
    pub(crate) fn move_to_staged_name(&mut self, dest: &OsStr) -> io::Result<()> {
        self.move_to(&protocol_name(dest, new_id(), NameKind::Locked))
    }

    /// Renames the stage within its directory, to `name`, which is random: nothing stands there.
    pub(crate) fn rename_to(&mut self, name: OsString) -> Result<(), PublishError> {
        let dir = Arc::clone(&self.dir);
        self.publish(&dir, &name, false)?;
        self.moved_to(&dir, name);
        Ok(())
    }

    /// Renames the stage within its directory, to `name`, which must be free.
    pub(crate) fn move_to(&mut self, name: &OsStr) -> io::Result<()> {
        let dir = Arc::clone(&self.dir);
        self.attempt(&dir, name, |from, own| from.rename_new(own, &dir, name))
            .map_err(PublishError::of_rename)?;
        self.path = dir.path_of(name);
        self.name = name.to_owned();
        Ok(())
    }

    /// Exchanges the stage with `old`, which is in the same directory: `old` takes over the stage's name and is returned as its owner. The
    /// staged file is in place then, and its descriptor and lock are given up.
    ///
    /// The name may mean another file than `old` where somebody replaced that in the last moment;
    /// [`has_name`](Self::has_name) tells.
    pub(crate) fn exchange(&mut self, mut old: Self) -> Result<Self, PublishError> {
        let (dir, dest) = (Arc::clone(&self.dir), old.name.clone());
        self.attempt(&dir, &dest, |_, own| dir.exchange(own, &dest))?;
        self.unlink_on_drop = false;
        // rename(2) would have refused a directory that came there in the last moment.
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

    /// Whether the stage's name still means its file.
    pub(crate) fn is_linked(&self) -> bool {
        self.check_linked().is_ok_and(|ours| ours)
    }

    fn check_linked(&self) -> io::Result<bool> {
        Ok(self.dir.entry(&self.name)?.map(|entry| entry.id) == Some(self.id))
    }

    /// Fails unless both the descriptor and the name still mean the file that was created.
    pub(crate) fn check(&self) -> io::Result<Stat> {
        let stat = stat_of(&self.file)?;
        if stat.id != self.id {
            return Err(io::Error::other(
                "the writer's `File` was exchanged for another file",
            ));
        }
        if !self.check_linked()? {
            return Err(io::Error::new(
                ErrorKind::NotFound,
                "somebody removed or replaced the staged file",
            ));
        }
        Ok(stat)
    }

    /// Renames the stage to `name` in `dir`, replacing what is there unless `no_clobber`.
    ///
    /// `Ok` means that `name` is the stage; with a [`Leftover`] where the stage's own name for it remains.
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
                // The stage's own name stays in any case, and tells nothing.
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

    /// After it was moved to `name` in `dir`, makes that the stage's own name again.
    pub(crate) fn moved_to(&mut self, dir: &Arc<Directory>, name: OsString) {
        self.dir = Arc::clone(dir);
        self.path = dir.path_of(&name);
        self.name = name;
        self.unlink_on_drop = true;
    }

    /// Gives up the stage's name to whoever recovers: it is not removed.
    pub(crate) fn disarm(&mut self) {
        self.unlink_on_drop = false;
    }

    /// Removes the stage.
    pub(crate) fn discard(mut self) -> Result<(), Leftover> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), Leftover> {
        if !std::mem::take(&mut self.unlink_on_drop) {
            return Ok(());
        }
        let removed = match self.check_linked() {
            // Against the rules somebody removed the stage, and the slot is another writer's now.
            Ok(false) => Ok(()),
            // Where the look fails, the rules are to be relied upon: we hold the lock.
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
        // Nowhere to report to: `discard` is for those who want to know, and a sweep finds what stays.
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
        fn every_name_given_to_a_stage_is_recognised_and_short(
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
    fn any_other_name_is_not(#[case] name: &str) {
        assert_eq!(kind_of_name(OsStr::new(name)), None);
    }
}
