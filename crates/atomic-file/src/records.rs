//! The group records in a directory: which are trusted, and which staged files they protect.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _};

use crate::directory::Directory;
use crate::error::RecoverError;
use crate::ids::UserId;
use crate::names::{PREFIX, is_record_name};
use crate::record::{self, Member, Unreadable};
use crate::stat::Stat;
use crate::sys::file_owner;

/// Returns the names in `dir` that begin with this crate's prefix.
pub(crate) fn list(dir: &Directory) -> Result<Vec<OsString>, RecoverError> {
    dir.names(PREFIX).map_err(|source| RecoverError::Io {
        operation: "list the directory",
        path: dir.path().to_owned(),
        source,
    })
}

pub(crate) fn records(names: &[OsString]) -> impl Iterator<Item = &OsString> {
    names.iter().filter(|name| is_record_name(name))
}

/// Returns whether `dir` has no record that a recovery by this user would trust.
pub(crate) fn no_trusted_record(dir: &Directory) -> io::Result<bool> {
    for name in records(&dir.names(PREFIX)?) {
        if dir
            .entry(name)?
            .is_some_and(|entry| is_trusted(dir, &entry))
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The users whose staged files a record protects from a sweep.
///
/// A foreign record protects the files of its own user only: otherwise any user could block all
/// sweeps. A record of root protects all: when owners are preserved, root's staged files change
/// their owner before they are renamed, and only root can write such a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Protects {
    All,
    FilesOf(u32),
}

/// The staged files that the published records of a directory name. Each record is read once.
///
/// The sets are ordered: hashed ones need random numbers, and panic if the system returns none.
#[derive(Debug, Default)]
pub(crate) struct Records {
    seen: BTreeSet<OsString>,
    named: BTreeSet<(OsString, Protects)>,
    /// Protection by records that may name any file: damaged records, and records that were not
    /// read.
    unknown: BTreeSet<Protects>,
    /// Bytes read so far of the records of each other user.
    read: BTreeMap<u32, u64>,
}

impl Records {
    /// Reads the records that were published in `dir` since the last call. If a user is given,
    /// reads only those that may protect that user's files.
    pub(crate) fn refresh(&mut self, dir: &Directory, user: Option<UserId>) -> io::Result<()> {
        for name in records(&dir.names(PREFIX)?) {
            if self.seen.contains(name) {
                continue;
            }
            let Some(entry) = dir.entry(name)? else {
                continue;
            };
            // The name is random, so no later record has the same one.
            self.seen.insert(name.clone());
            let protects = match is_trusted(dir, &entry) || may_be_of_root(dir, &entry) {
                true => Protects::All,
                false => Protects::FilesOf(entry.uid.raw()),
            };
            let concerns = |user: UserId| {
                protects == Protects::All || protects == Protects::FilesOf(user.raw())
            };
            if entry.is_file() && user.is_none_or(concerns) {
                self.add(dir, name, entry.uid, protects);
            }
        }
        Ok(())
    }

    fn add(&mut self, dir: &Directory, name: &OsStr, owner: UserId, protects: Protects) {
        match self.read(dir, name, owner) {
            Ok(Ok(members)) => {
                let named = members.into_iter().map(|member| (member.staged, protects));
                self.named.extend(named);
            }
            Ok(Err(Unreadable::Torn(_))) => {}
            // Its process has just finished.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(Err(Unreadable::Damaged(_))) | Err(_) => {
                self.unknown.insert(protects);
            }
        }
    }

    fn read(
        &mut self,
        dir: &Directory,
        name: &OsStr,
        owner: UserId,
    ) -> io::Result<Result<Vec<Member>, Unreadable>> {
        let file = dir.open_file(name)?;
        if owner.is(file_owner()) {
            return read(&file);
        }
        let read = self.read.entry(owner.raw()).or_default();
        let Some(bytes) = bytes_of(&file, MAX_RECORD_LEN.min(MAX_FOREIGN_BYTES - *read))? else {
            return Ok(Err(Unreadable::Damaged("too long")));
        };
        *read += bytes.len() as u64;
        Ok(record::decode(&bytes))
    }

    /// Returns whether a record names the staged file `staged` of this user, so that it is not
    /// orphaned.
    pub(crate) fn name(&self, staged: &OsStr, user: UserId) -> bool {
        [Protects::All, Protects::FilesOf(user.raw())]
            .into_iter()
            .any(|by| self.unknown.contains(&by) || self.named.contains(&(staged.to_owned(), by)))
    }
}

/// Returns whether only root can have written a record.
fn is_root_record(dir: &Directory, record: &Stat) -> bool {
    record.uid.is(UserId::ROOT) && only_owner_could_write(dir, record)
}

/// Returns whether root may have written a record, and no other user than its owner: root outside
/// this user namespace is one of the users that the namespace does not map.
fn may_be_of_root(dir: &Directory, record: &Stat) -> bool {
    (record.uid.is(UserId::ROOT) || !record.uid.is_mapped()) && only_owner_could_write(dir, record)
}

/// Returns whether a record protects the staged files of all users: one of root, or of the
/// directory's owner if no other user may create files.
pub(crate) fn protects_all(dir: &Directory, record: &Stat) -> bool {
    is_root_record(dir, record) || (record.uid.is(dir.stat.uid) && !dir.others_may_create())
}

/// Returns whether no user other than its owner can have created or written to a record.
fn only_owner_could_write(dir: &Directory, record: &Stat) -> bool {
    const GROUP_AND_OTHERS: u32 = 0o077;
    record.is_file()
        && (!dir.others_may_create() || (record.links == 1 && record.mode & GROUP_AND_OTHERS == 0))
}

/// Returns whether this user's recoveries execute a record.
///
/// Another user must not have created it. In a directory where other users may create files, they
/// may have hard-linked a file of this user to the record's name, or have written to it.
pub(crate) fn is_trusted(dir: &Directory, record: &Stat) -> bool {
    let own = record.uid.is(file_owner());
    let owners = record.uid.is(dir.stat.uid) && !dir.others_may_create();
    (own || owners) && only_owner_could_write(dir, record)
}

/// Maximum length of a record in bytes: at least twelve thousand members.
pub(crate) const MAX_RECORD_LEN: u64 = 4 << 20;

/// Maximum number of bytes read of the records of each other user in one sweep. It bounds what any
/// user can make root read. Staged files of records beyond it are kept.
const MAX_FOREIGN_BYTES: u64 = 4 * MAX_RECORD_LEN;

/// Reads a record from its beginning.
pub(crate) fn read(file: &File) -> io::Result<Result<Vec<Member>, Unreadable>> {
    let bytes = bytes_of(file, MAX_RECORD_LEN)?;
    Ok(bytes.map_or(Err(Unreadable::Damaged("too long")), |bytes| {
        record::decode(&bytes)
    }))
}

/// Returns all bytes of a file, or `None` if it is longer than `limit`.
fn bytes_of(mut file: &File, limit: u64) -> io::Result<Option<Vec<u8>>> {
    if file.metadata()?.len() > limit {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.rewind()?;
    // The file may be growing.
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{NameKind, protocol_name, record_name};
    use crate::record::Old;

    #[test]
    fn an_overlong_record_is_not_read() {
        const LIMIT: u64 = MAX_RECORD_LEN;
        let file = tempfile::tempfile().unwrap();
        for (len, too_long) in [(LIMIT, false), (LIMIT + 1, true), (1 << 40, true)] {
            file.set_len(len).unwrap();
            let problem = read(&file).unwrap().unwrap_err();
            let refused = problem == Unreadable::Damaged("too long");
            assert_eq!(refused, too_long, "{len}: {problem:?}");
        }
    }

    /// The number of a user identifies its record and the staged file that the record names.
    fn publish_as(dir: &Directory, user: u32) {
        use std::os::unix::fs::{PermissionsExt as _, chown};
        let member = Member {
            inode: 0,
            size: 0,
            old: Old::Unknown,
            staged: staged_by(user),
            dest: "dest".into(),
        };
        let path = dir.path_of(&record_name(user.into()));
        std::fs::write(&path, record::encode(&[member])).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(user), None).unwrap();
    }

    fn staged_by(user: u32) -> OsString {
        protocol_name(OsStr::new("dest"), user.into(), NameKind::Locked)
    }

    #[test]
    fn only_records_that_may_protect_the_given_user_are_read() {
        use std::os::unix::fs::PermissionsExt as _;
        const ROOT: u32 = 0;
        const USER: u32 = 12345;
        const OTHER_USER: u32 = 54321;
        test_machine::needs!(Root);
        let temporary = tempfile::tempdir().unwrap();
        let mode = std::fs::Permissions::from_mode(0o1777);
        std::fs::set_permissions(temporary.path(), mode).unwrap();
        let dir = Directory::open(temporary.path()).unwrap();
        for user in [ROOT, USER, OTHER_USER] {
            publish_as(&dir, user);
        }
        let user = UserId::new(USER);

        let mut records = Records::default();
        records.refresh(&dir, Some(user)).unwrap();
        assert_eq!(records.named.len(), 2);
        assert!(records.name(&staged_by(ROOT), user));
        assert!(records.name(&staged_by(USER), user));
        assert_eq!(records.read.into_keys().collect::<Vec<_>>(), [USER]);

        let mut records = Records::default();
        records.refresh(&dir, None).unwrap();
        assert_eq!(records.named.len(), 3);
        assert!(!records.name(&staged_by(OTHER_USER), user));
        assert!(!records.name(&staged_by(USER), UserId::new(OTHER_USER)));
    }
}
