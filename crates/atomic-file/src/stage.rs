//! A staged file: created, locked, moved into place or removed.
//!
//! # Names and locks
//! A stage is called `.atomic-file-HASH-SLOT.stage`: HASH is the CRC-32 of the destination's name, so that the name
//! has a fixed length whatever the destination's; SLOT counts from 0. A writer takes the first free slot, and on its
//! way looks into the taken ones: leftovers of a destination are found without listing the directory.
//!
//! The living hold the `flock` of their stage from just after its creation until it is in place or removed. Two rules make
//! this safe in the moment between creating and locking, and with slots used again:
//!
//! 1. A creator that got the lock looks whether the name still means its file, and takes another slot if not.
//!    One that did not get it waits: a sweeper has it for a moment, and leaves the file where a record stands.
//! 2. A stage is unlinked only under its lock: by its owner, or by a sweeper that, *after* getting the lock, has seen that
//!    no group record is published and then that the name still means the locked file.
//!
//! What a commit [exchanged](Stage::exchange) for its stage stands under the stage's name, locked by that commit; `spare.rs` tells what
//! becomes of it.
//!
//! So a name can change its meaning only through the one who holds the lock, and a sweeper's last look stays true until
//! it unlinks. A dead owner can publish no record any more, hence the order of a sweeper's looks.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::directory::{Directory, FileId, Stat, stat_of};
use crate::error::Leftover;
use crate::outcome::{PublishError, has_no_such_call, make_sure};
use crate::record::RECORD_NAME;
use crate::sys::{Lock, Unlock, try_lock};

const PREFIX: &str = ".atomic-file-";
const LOCKED: &str = ".stage";
/// For file systems without locks: nobody can tell whether the owner of such a stage lives.
const UNLOCKED: &str = ".unlocked-stage";
/// One per destination, so without a slot: see `spare.rs`.
const SPARE: &str = ".spare";
/// More writers to one destination at once than anybody means.
pub(crate) const SLOTS: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StageName {
    Locked,
    Unlocked,
    Spare,
}

/// Whether `name` is one that this module gives to stages and spares.
pub(crate) fn parse_name(name: &OsStr) -> Option<StageName> {
    let rest = name.to_str()?.strip_prefix(PREFIX)?;
    let is_hex = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    };
    if let Some(hash) = rest.strip_suffix(SPARE) {
        return (hash.len() == 8 && is_hex(hash)).then_some(StageName::Spare);
    }
    let (rest, kind) = if let Some(rest) = rest.strip_suffix(UNLOCKED) {
        (rest, StageName::Unlocked)
    } else {
        (rest.strip_suffix(LOCKED)?, StageName::Locked)
    };
    let (hash, slot) = rest.split_once('-')?;
    (hash.len() == 8 && is_hex(hash) && slot.len() <= 16 && is_hex(slot)).then_some(kind)
}

pub(crate) fn stage_name(dest: &OsStr, slot: u64, kind: StageName) -> OsString {
    let hash = crc32fast::hash(dest.as_bytes());
    match kind {
        StageName::Locked => format!("{PREFIX}{hash:08x}-{slot:x}{LOCKED}"),
        StageName::Unlocked => format!("{PREFIX}{hash:08x}-{slot:x}{UNLOCKED}"),
        StageName::Spare => format!("{PREFIX}{hash:08x}{SPARE}"),
    }
    .into()
}

pub(crate) fn spare_name(dest: &OsStr) -> OsString {
    stage_name(dest, 0, StageName::Spare)
}

/// What became of a stage that may be dead.
#[derive(Debug)]
pub(crate) enum Inspected {
    Removed,
    Gone,
    Living,
    Kept(io::Error),
}

/// Removes the stage `name` if its owner is dead. Never waits, and never touches a living one.
pub(crate) fn remove_if_dead(dir: &Directory, name: &OsStr) -> Inspected {
    let kept = |reason: &'static str| Inspected::Kept(io::Error::other(reason));
    let attempt = || -> io::Result<Inspected> {
        match dir.entry(name)? {
            None => return Ok(Inspected::Gone),
            Some(entry) if !entry.is_file() => {
                return Ok(kept("has a stage's name, but is no regular file"));
            }
            Some(_) => {}
        }
        let file = dir.open_file(name)?;
        match try_lock(&file)? {
            Lock::Held => {}
            Lock::Taken => return Ok(Inspected::Living),
            Lock::Unsupported(error) => return Ok(Inspected::Kept(error)),
        }
        let _unlock = Unlock(&file);
        if dir.entry(OsStr::new(RECORD_NAME))?.is_some() {
            return Ok(kept(
                "a group commit is pending in the directory: call `recover`",
            ));
        }
        if dir.entry(name)?.map(|entry| entry.id) != Some(stat_of(&file)?.id) {
            return Ok(Inspected::Gone);
        }
        dir.remove(name)?;
        Ok(Inspected::Removed)
    };
    match attempt() {
        Ok(inspected) => inspected,
        Err(error) if error.kind() == ErrorKind::NotFound => Inspected::Gone,
        Err(error) => Inspected::Kept(error),
    }
}

/// Has `take` try the slots of `dest` from `slot` on, until one is not taken already; what is dead on the way is removed. The slot's name, and what
/// `take` made of it.
pub(crate) fn at_free_slot<T>(
    dir: &Directory,
    dest: &OsStr,
    kind: StageName,
    mut slot: u64,
    mut take: impl FnMut(&OsStr) -> Result<T, PublishError>,
) -> Result<(OsString, T), PublishError> {
    while slot < SLOTS {
        let name = stage_name(dest, slot, kind);
        match take(&name) {
            Err(PublishError::Not(error)) if error.kind() == ErrorKind::AlreadyExists => {
                let freed = kind == StageName::Locked && is_freed(dir, &name);
                slot += u64::from(!freed);
            }
            taken => return taken.map(|taken| (name, taken)),
        }
    }
    Err(PublishError::Not(no_slot()))
}

/// Whether a taken name is free now, because its owner was dead or has just finished.
fn is_freed(dir: &Directory, name: &OsStr) -> bool {
    matches!(
        remove_if_dead(dir, name),
        Inspected::Removed | Inspected::Gone
    )
}

fn no_slot() -> io::Error {
    io::Error::new(
        ErrorKind::StorageFull,
        "every name for a stage of this destination is taken: sweep the directory",
    )
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
pub(crate) struct Stage {
    dir: Arc<Directory>,
    name: OsString,
    path: PathBuf,
    file: File,
    id: FileId,
    locked: bool,
    /// Whether `name` is ours to remove.
    named: bool,
}

impl Stage {
    /// Stages an empty file, mode 0600, for a destination called `dest`.
    pub(crate) fn create(dir: &Arc<Directory>, dest: &OsStr) -> io::Result<Self> {
        let mut kind = StageName::Locked;
        let mut slot = 0;
        while slot < SLOTS {
            let name = stage_name(dest, slot, kind);
            let file = match dir.create_new(&name) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    let freed = kind == StageName::Locked && is_freed(dir, &name);
                    slot += u64::from(!freed);
                    continue;
                }
                Err(error) => {
                    // Over NFS the answer may have been lost, and the file be there. Whoever sweeps it takes it for a dead one.
                    let _: Inspected = remove_if_dead(dir, &name);
                    return Err(error);
                }
            };
            // The one failure after which our file has no identity yet: it is a moment old, and its name still means it.
            let id = stat_of(&file).inspect_err(|_| drop(dir.remove(&name)))?.id;
            let mut stage = Self {
                dir: Arc::clone(dir),
                path: dir.path_of(&name),
                name,
                id,
                file,
                locked: false,
                named: true,
            };
            if kind == StageName::Unlocked {
                return Ok(stage);
            }
            match lock_new(&stage.file)? {
                Lock::Held if stage.name_is_ours()? => {
                    stage.locked = true;
                    return Ok(stage);
                }
                // A sweeper was faster than our lock: what is at the name, if anything, is not ours to remove. Nor is what somebody
                // holds who is no sweeper.
                Lock::Held | Lock::Taken => stage.named = false,
                // Dropping the stage removes it.
                Lock::Unsupported(_) => kind = StageName::Unlocked,
            }
        }
        Err(no_slot())
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
        let stage = Self {
            dir: Arc::clone(dir),
            path: dir.path_of(name),
            name: name.to_owned(),
            id: stat_of(&file)?.id,
            file,
            locked: true,
            named: false,
        };
        Ok(stage.name_is_ours()?.then_some(stage))
    }

    /// From here on dropping removes the file's name.
    pub(crate) fn own_name(&mut self) {
        self.named = true;
    }

    /// Renames the stage within its directory, to the first free slot of `dest`.
    pub(crate) fn move_to_slot(&mut self, dest: &OsStr) -> io::Result<()> {
        let dir = Arc::clone(&self.dir);
        let take = |name: &OsStr| self.move_to(name).map_err(PublishError::Not);
        let moved = at_free_slot(&dir, dest, StageName::Locked, 0, take);
        moved.map(drop).map_err(PublishError::of_rename)
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
        self.named = false;
        // rename(2) would have refused a directory that came there in the last moment.
        if let Ok(Some(there)) = dir.entry(&self.name)
            && there.is_dir()
        {
            let is_dir = || io::Error::from(ErrorKind::IsADirectory);
            return Err(match dir.exchange(&self.name, &dest) {
                Ok(()) => {
                    self.named = true;
                    PublishError::Not(is_dir())
                }
                Err(errno) => PublishError::Unknown {
                    rename: is_dir(),
                    look: errno.into(),
                },
            });
        }
        old.path.clone_from(&self.path);
        old.name.clone_from(&self.name);
        old.named = true;
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
    pub(crate) fn has_name(&self) -> bool {
        self.name_is_ours().is_ok_and(|ours| ours)
    }

    fn name_is_ours(&self) -> io::Result<bool> {
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
        if !self.name_is_ours()? {
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
            self.named = false;
            return Ok(None);
        }
        match self.attempt(dir, name, |from, own| from.rename_new(own, dir, name)) {
            Ok(()) => {
                self.named = false;
                Ok(None)
            }
            Err(PublishError::Not(error)) if has_no_such_call(&error) => {
                let link = || self.dir.link(&self.name, dir, name);
                // The stage's own name stays in any case, and tells nothing.
                make_sure(link, || self.is_at(dir, name), || false)?;
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
        make_sure(moved, || self.is_at(dir, name), || self.has_name())
    }

    fn is_at(&self, dir: &Directory, name: &OsStr) -> io::Result<bool> {
        let Some(entry) = dir.entry(name)? else {
            return Ok(false);
        };
        let own = stat_of(&self.file)?;
        Ok((entry.id, entry.size) == (own.id, own.size))
    }

    /// After it was moved to `name` in `dir`, makes that the stage's own name again.
    pub(crate) fn stands_at(&mut self, dir: &Arc<Directory>, name: OsString) {
        self.dir = Arc::clone(dir);
        self.path = dir.path_of(&name);
        self.name = name;
        self.named = true;
    }

    /// Gives up the stage's name to whoever recovers: it is not removed.
    pub(crate) fn leave(&mut self) {
        self.named = false;
    }

    /// Removes the stage.
    pub(crate) fn discard(mut self) -> Result<(), Leftover> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), Leftover> {
        if !std::mem::take(&mut self.named) {
            return Ok(());
        }
        let removed = match self.name_is_ours() {
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

impl Drop for Stage {
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
            slot: u64,
            kind in prop_oneof![
                Just(StageName::Locked), Just(StageName::Unlocked), Just(StageName::Spare),
            ],
        ) {
            let name = stage_name(OsStr::from_bytes(&dest), slot, kind);
            prop_assert_eq!(parse_name(&name), Some(kind));
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
    fn any_other_name_is_not(#[case] name: &str) {
        assert_eq!(parse_name(OsStr::new(name)), None);
    }
}
