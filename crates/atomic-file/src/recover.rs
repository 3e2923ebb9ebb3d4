//! Finishing what a killed process left half-done.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};

use crate::directory::{Directory, stat_of};
use crate::error::RecoverError;
use crate::options::Durability;
use crate::outcome::{PublishError, make_sure};
use crate::record::{self, Member, RECORD_NAME};
use crate::sweep::{SweepReport, sweep_open};
use crate::sys::{Lock, Unlock, lock, try_lock};

/// What [`recover`] found and did.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct RecoverReport {
    /// Destinations replaced by this call.
    pub completed: Vec<PathBuf>,
    /// Destinations that the killed process had replaced already.
    pub in_place: Vec<PathBuf>,
    /// Destinations that the killed process had replaced and that another writer has replaced since.
    pub superseded: Vec<PathBuf>,
    /// Whether a group commit is under way in the directory, by a process that lives; nothing was done about it.
    pub busy: bool,
    /// What became of the stages found, those of unpublished groups among them.
    pub swept: SweepReport,
}

/// Completes a group commit that a killed process left published in `dir`, then [sweeps](crate::sweep) the directory,
/// which undoes an unpublished one.
///
/// [`AtomicWriter::open`](crate::AtomicWriter::open) and every commit complete a published group in their directory too;
/// call this on start-up, before reading the files of a group, as readers know nothing of records.
/// Calling it twice, or killing it at any point and calling it again, does no harm. It never waits.
///
/// # Errors
/// See [`RecoverError`]. Nothing is guessed at: a damaged record, or a stage that is not the one recorded, is left
/// as it is.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// let report = atomic_file::recover(dir.path())?;
/// for path in &report.completed {
///     eprintln!("{} is now the new one", path.display());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn recover(dir: impl AsRef<Path>) -> Result<RecoverReport, RecoverError> {
    let dir = Directory::open(dir.as_ref()).map_err(|source| RecoverError::Io {
        operation: "open the directory",
        path: dir.as_ref().to_owned(),
        source,
    })?;
    let mut report = settle(&dir, Owner::LeaveAlone)?;
    report.swept = sweep_open(&dir)?;
    Ok(report)
}

/// What to do about a record whose owner lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner<'a> {
    /// It will finish by itself.
    LeaveAlone,
    /// Return only when the record is gone.
    WaitFor,
    /// The same where the record names this destination: whoever completes the group, its owner or another, would replace what is put there.
    WaitForIfIn(&'a OsStr),
}

/// Completes the group whose record stands in `dir`, if one does and its owner is dead.
pub(crate) fn settle(dir: &Directory, owner: Owner<'_>) -> Result<RecoverReport, RecoverError> {
    let name = OsStr::new(RECORD_NAME);
    let path = dir.path_of(name);
    let failed = |operation| {
        let path = path.clone();
        move |source| RecoverError::Io {
            operation,
            path,
            source,
        }
    };
    let mut report = RecoverReport::default();
    while let Some(entry) = dir.entry(name).map_err(failed("look for"))? {
        if !entry.is_file() {
            return Err(RecoverError::Damaged {
                path,
                problem: "not a regular file",
            });
        }
        if others_may_create(dir) && entry.uid != nix::unistd::geteuid().as_raw() {
            return Err(RecoverError::Untrusted {
                path,
                owner: entry.uid,
            });
        }
        let file = match dir.open_file(name) {
            Ok(file) => file,
            // Its owner has just finished.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("open")(error)),
        };
        match try_lock(&file).map_err(failed("lock"))? {
            Lock::Held => {}
            Lock::Taken if !is_waited_for(owner, &file).map_err(failed("read"))? => {
                report.busy = true;
                return Ok(report);
            }
            Lock::Taken => lock(&file).map_err(failed("lock"))?,
            Lock::Unsupported(error) => return Err(failed("lock")(error)),
        }
        let _unlock = Unlock(&file);
        // Under the lock the name is ours to remove, if it still means the file that we locked.
        let locked = stat_of(&file).map_err(failed("inspect"))?.id;
        if dir
            .entry(name)
            .map_err(failed("look for"))?
            .map(|now| now.id)
            != Some(locked)
        {
            continue;
        }
        let members = read(&file).map_err(failed("read"))?;
        let members = members.map_err(|problem| RecoverError::Damaged {
            path: path.clone(),
            problem,
        })?;
        roll_forward(dir, &members, &mut report)?;
        finish(dir).map_err(failed("remove"))?;
    }
    Ok(report)
}

/// Whether the end of a group is to be waited for whose record somebody has locked. It was written whole before it was published.
fn is_waited_for(owner: Owner<'_>, record: &File) -> io::Result<bool> {
    Ok(match owner {
        Owner::LeaveAlone => false,
        Owner::WaitFor => true,
        Owner::WaitForIfIn(dest) => {
            read(record)?.is_ok_and(|members| members.iter().any(|member| member.dest == dest))
        }
    })
}

/// Whether a record here may be somebody else's doing.
fn others_may_create(dir: &Directory) -> bool {
    const GROUP_OR_OTHERS_WRITE: u32 = 0o022;
    dir.stat.mode & GROUP_OR_OTHERS_WRITE != 0
}

/// From its beginning.
fn read(mut file: &File) -> io::Result<Result<Vec<Member>, &'static str>> {
    /// Tens of thousands of members; no record is larger.
    const LIMIT: u64 = 16 << 20;
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Ok(Err("too long"));
    }
    Ok(record::decode(&bytes))
}

/// Replaces what is not replaced yet, once every member has been found to be what the record says.
fn roll_forward(
    dir: &Directory,
    members: &[Member],
    report: &mut RecoverReport,
) -> Result<(), RecoverError> {
    let mut left = Vec::new();
    for member in members {
        match find(dir, member)? {
            Found::Staged => left.push(member),
            Found::InPlace => report.in_place.push(dir.path_of(&member.dest)),
            Found::Nowhere => report.superseded.push(dir.path_of(&member.dest)),
        }
    }
    for member in left {
        rename_member(dir, member).map_err(|error| RecoverError::Io {
            operation: "replace",
            path: dir.path_of(&member.dest),
            source: error.of_rename(),
        })?;
        report.completed.push(dir.path_of(&member.dest));
    }
    dir.sync(Durability::Full)
        .map_err(|source| RecoverError::Io {
            operation: "sync the directory",
            path: dir.path().to_owned(),
            source,
        })
}

enum Found {
    Staged,
    InPlace,
    Nowhere,
}

fn find(dir: &Directory, member: &Member) -> Result<Found, RecoverError> {
    let inspect = |name: &OsStr| {
        dir.entry(name).map_err(|source| RecoverError::Io {
            operation: "inspect",
            path: dir.path_of(name),
            source,
        })
    };
    if inspect(&member.dest)?.is_some_and(|entry| entry.id.inode == member.inode) {
        return Ok(Found::InPlace);
    }
    match inspect(&member.stage)? {
        // Nobody sweeps while a record stands, so it was renamed, and its destination then replaced again.
        None => Ok(Found::Nowhere),
        Some(entry)
            if entry.is_file() && (entry.id.inode, entry.size) == (member.inode, member.size) =>
        {
            Ok(Found::Staged)
        }
        Some(_) => Err(RecoverError::StageChanged {
            stage: dir.path_of(&member.stage),
            dest: dir.path_of(&member.dest),
            record: dir.path_of(OsStr::new(RECORD_NAME)),
        }),
    }
}

/// Puts one member of a published group in place.
pub(crate) fn rename_member(dir: &Directory, member: &Member) -> Result<(), PublishError> {
    let is_at = |name: &OsStr| {
        dir.entry(name)
            .map(|entry| entry.is_some_and(|entry| entry.id.inode == member.inode))
    };
    make_sure(
        || dir.rename(&member.stage, dir, &member.dest),
        || is_at(&member.dest),
        || is_at(&member.stage).is_ok_and(|here| here),
    )
}

/// Removes the record of a group whose members are all in place, for good.
fn finish(dir: &Directory) -> io::Result<()> {
    dir.remove(OsStr::new(RECORD_NAME))?;
    dir.sync(Durability::Full)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(0o700, false)]
    #[case(0o755, false)]
    #[case(0o775, true)]
    #[case(0o757, true)]
    #[case(0o1777, true)]
    fn a_record_is_somebody_elses_only_where_others_may_write(
        #[case] mode: u32,
        #[case] others: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
        let dir = Directory::open(dir.path()).unwrap();
        assert_eq!(others_may_create(&dir), others);
    }

    #[test]
    fn a_record_that_no_group_can_have_is_not_read_to_its_end() {
        const LIMIT: u64 = 16 << 20;
        let file = tempfile::tempfile().unwrap();
        for (len, too_long) in [(LIMIT, false), (LIMIT + 1, true), (1 << 40, true)] {
            file.set_len(len).unwrap();
            let problem = read(&file).unwrap().unwrap_err();
            assert_eq!(problem == "too long", too_long, "{len}: {problem}");
        }
    }
}
