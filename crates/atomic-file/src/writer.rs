//! Staging one file and committing it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use nix::unistd::{Uid, fchown};

use crate::attribute::{Attribute, NotPreserved};
use crate::destination::{Destination, check_directory, check_replaceable};
use crate::directory::Directory;
use crate::durability::Durability;
use crate::error::{CommitError, CommitStep, Leftover, OpenError};
use crate::locked_file::LockedFile;
use crate::names::PREFIX;
use crate::options::Options;
use crate::preflight::{PreflightError, preflight};
use crate::preserve::{self, Preserve};
use crate::records::list;
use crate::recover::recover_pending_for;
use crate::recycle;
use crate::rename::{PublishError, has_no_links};
use crate::retry::retry;
use crate::staged_file::{STAGED_MODE, StagedFile};
use crate::stat::{Stat, stat_of};
use crate::sweep::remove_leftovers;
use crate::sys;
use crate::version::FileVersion;

/// A staged file that atomically replaces its destination on [`commit`](Self::commit).
///
/// Until the commit, it has a name of its own in the destination's directory. Dropping the writer
/// removes it, also during a panic.
///
/// # Examples
/// ```
/// use std::io::Write;
/// use atomic_file::AtomicWriter;
/// # let dir = tempfile::tempdir()?;
/// # let dest = dir.path().join("memory.bin");
///
/// let mut writer = AtomicWriter::open(&dest)?;
/// writer.write_all(b"header")?;
/// writer.write_all_at(b"page", 4096)?;
/// assert!(!dest.exists());
/// writer.commit()?;
/// assert_eq!(std::fs::metadata(&dest)?.len(), 4100);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AtomicWriter {
    pub(crate) staged: StagedFile,
    pub(crate) dest: Destination,
    mode: u32,
    preserve: Preserve,
    not_preserved: Vec<NotPreserved>,
    pub(crate) durability: Durability,
    pub(crate) no_clobber: bool,
    pub(crate) replace_only: Option<FileVersion>,
    /// Maximum size of a replaced file that is kept for reuse, in bytes.
    recycle: Option<u64>,
    recycled: bool,
}

impl AtomicWriter {
    /// Stages a new file for `dest` with the default [`Options`].
    ///
    /// # Errors
    /// Returns an [`OpenError`]. No file is left behind except those that the error names.
    pub fn open(dest: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::options().open(dest)
    }

    /// Returns a builder for non-default options.
    pub fn options() -> Options {
        Options::default()
    }

    pub(crate) fn open_with(path: &Path, options: &Options) -> Result<Self, OpenError> {
        let dest = Destination::resolve(path, options.symlinks)?;
        if options.no_clobber && dest.entry.is_some() {
            return Err(OpenError::AlreadyExists {
                path: path.to_owned(),
            });
        }
        check_replaceable(&dest)?;
        let recover = |source| OpenError::Recover {
            path: path.to_owned(),
            source,
        };
        let listing = |source| OpenError::io("list the directory of", path, source);
        let names = dest.dir.names(PREFIX).map_err(listing)?;
        recover_pending_for(&dest.dir, &dest.name, &names, false).map_err(recover)?;
        // A recovery may have replaced the destination, so compare after it.
        if let Some(version) = &options.replace_only {
            let is_there = version.is_at(&dest);
            if !is_there.map_err(|source| OpenError::io("inspect", path, source))? {
                return Err(OpenError::DestinationChanged {
                    path: path.to_owned(),
                });
            }
            let turn = version.lock_for_commit(&dest);
            drop(turn.map_err(|source| OpenError::io("lock", path, source))?);
        }
        let dest_owner = dest.entry.filter(Stat::is_file).map(|entry| entry.uid);
        remove_leftovers(&dest.dir, &dest.name, dest_owner, &names);
        let staging = match &options.staging_dir {
            None => Arc::clone(&dest.dir),
            Some(elsewhere) => open_staging(elsewhere, &dest)?,
        };
        let elsewhere = staging.stat.id != dest.dir.stat.id;
        if elsewhere {
            check_directory(&staging, path)?;
            let names = staging
                .names(PREFIX)
                .map_err(|source| OpenError::OpenDirectory {
                    path: staging.path().to_owned(),
                    source,
                })?;
            remove_leftovers(&staging, &dest.name, dest_owner, &names);
        }
        if elsewhere || options.no_clobber {
            preflight(&staging, &dest.dir, &dest.name, options.no_clobber)
                .map_err(|error| explain(error, path, &dest.dir, &staging, options))?;
        }
        let recycle = options.recycle.filter(|_| !elsewhere);
        let reused = match recycle {
            Some(max_bytes) => recycle::reuse(&dest.dir, &dest.name, max_bytes),
            None => {
                recycle::remove(&dest.dir, &dest.name);
                None
            }
        };
        let recycled = reused.is_some();
        let staged = reused
            .map_or_else(|| StagedFile::create(&staging, &dest.name), Ok)
            .map_err(|source| not_staged(&staging, path, source))?;
        let not_preserved = try_attributes(&staged, &dest, options)?;
        // The commit lists the directory with the staged file open: detect the descriptor limit
        // now.
        drop(dest.dir.open_to_list().map_err(listing)?);
        Ok(Self {
            staged,
            dest,
            mode: options.mode,
            preserve: options.preserve,
            not_preserved,
            durability: options.durability,
            no_clobber: options.no_clobber,
            replace_only: options.replace_only.clone(),
            recycle,
            recycled,
        })
    }

    /// Returns the destination as it was given to `open`.
    #[must_use]
    pub fn dest_path(&self) -> &Path {
        &self.dest.path
    }

    /// Returns the path of the staged file: the destination's directory as given (or the directory
    /// that its link leads to), and the name of the staged file.
    ///
    /// A relative path stays relative. The writer does not use this path, so changing the current
    /// directory or renaming the destination's directory is harmless. The path then leads
    /// elsewhere, but [`file`](Self::file) does not.
    #[must_use]
    pub fn temp_path(&self) -> &Path {
        self.staged.path()
    }

    /// Returns the attributes of the replaced file that the new file will lack, if
    /// [`preserve`](Options::preserve) requests them [if permitted](Preserve::if_permitted).
    #[must_use]
    pub fn not_preserved(&self) -> &[NotPreserved] {
        &self.not_preserved
    }

    /// Returns whether the staged file is a replaced file that [`Options::recycle`] reused.
    ///
    /// A recycled file still has its old length and bytes. The caller must set the length and
    /// overwrite or zero all other bytes: old bytes that remain are committed. Otherwise the staged
    /// file is new and empty.
    #[must_use]
    pub fn recycled(&self) -> bool {
        self.recycled
    }

    /// Returns the staged file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        self.staged.file()
    }

    /// Returns the staged file, open for reading and writing.
    ///
    /// A commit fails if this `File` was replaced by another one.
    #[must_use]
    pub fn file_mut(&mut self) -> &mut File {
        self.staged.file_mut()
    }

    /// Writes all of `buf` at `offset` bytes from the start of the file. Neither uses nor changes
    /// the file's position, so several threads may call it.
    ///
    /// # Errors
    /// Returns the errors of `pwrite(2)`. Interrupted and short writes are retried. Bytes written
    /// before the error stay.
    pub fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file().write_all_at(buf, offset)
    }

    /// Syncs the file, renames it onto the destination, and syncs the directory.
    ///
    /// [`Durability`] selects which syncs take place. If several writers commit to one destination,
    /// the last one wins. Waits while a group that includes the destination is being completed.
    /// Empty files are committed like any other.
    ///
    /// # Errors
    /// Returns a [`CommitError`] that states which of the two files the destination is now. It is
    /// never a mixture.
    pub fn commit(self) -> Result<(), CommitError> {
        // Check before the sync, which can take long.
        let changed = |version: &FileVersion| version.is_at(&self.dest).is_ok_and(|is| !is);
        if self.replace_only.as_ref().is_some_and(changed) {
            return Err(destination_changed(self.staged, self.dest));
        }
        let finished = self.finish(self.durability);
        let Self {
            mut staged,
            dest,
            mode: _,
            preserve: _,
            not_preserved: _,
            durability,
            no_clobber,
            replace_only,
            recycle,
            recycled: _,
        } = self;
        // An older pending group would later replace the file that is committed now.
        let recover_pending = || {
            list(&dest.dir)
                .and_then(|names| recover_pending_for(&dest.dir, &dest.name, &names, true))
        };
        let ready = finished
            .and_then(|()| staged.check().map_err(|error| (CommitStep::Check, error)))
            .and_then(|_| {
                recover_pending().map_err(|error| (CommitStep::Recover, io::Error::other(error)))
            });
        if let Err((step, source)) = ready {
            return Err(not_replaced(staged, dest, step, source));
        }
        // The old file may be overwritten only if the directory was synced: otherwise a power loss
        // could restore it as the destination. A version to replace is open, so it is not kept;
        // locking it here would exclude this writer itself.
        let keeps_old = durability == Durability::Full && !no_clobber && replace_only.is_none();
        let old = recycle
            .filter(|_| keeps_old)
            .and_then(|max_bytes| recycle::lock_old(&dest.dir, &dest.name, max_bytes));
        // From here to the rename, the lock excludes other writers that have read the same file.
        let compare = |version| -> io::Result<_> {
            let mut turn = FileVersion::lock_for_commit(version, &dest)?;
            if let Some(turn) = &mut turn {
                turn.exclude_writers();
            }
            Ok((turn, version.is_at(&dest)?))
        };
        let turn = match replace_only.as_ref().map(compare) {
            None => None,
            Some(Ok((turn, true))) => turn,
            Some(Ok((_, false))) => return Err(destination_changed(staged, dest)),
            Some(Err(source)) => {
                return Err(not_replaced(staged, dest, CommitStep::Compare, source));
            }
        };
        let replaced = match publish(&mut staged, &dest, no_clobber, old) {
            Ok(replaced) => replaced,
            Err(PublishError::NotPublished(source)) => {
                return Err(not_replaced(staged, dest, CommitStep::Rename, source));
            }
            Err(PublishError::Unknown { rename, look }) => {
                return Err(CommitError::Unknown {
                    dest: dest.path,
                    rename,
                    source: look,
                });
            }
        };
        drop(turn);
        // Release the lock: it would block the next writer.
        drop(staged);
        // A group may have been published between the check and the rename, and its process have
        // died. Its record names the file that was here then, so no later recovery replaces the new
        // file. A recovery that checked before the rename must end before this commit returns.
        // Other failures do not concern this file.
        let _ = recover_pending();
        let synced = match durability {
            Durability::Full => dest.dir.sync(durability),
            Durability::Barrier | Durability::None => Ok(()),
        };
        let leftover = match replaced {
            Replaced::Removed(leftover) => leftover,
            Replaced::Exchanged(old) if synced.is_ok() => recycle::retain(old, &dest.name).err(),
            Replaced::Exchanged(old) => recycle::remove_replaced(old).err(),
        };
        match (synced, leftover) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(source)) => Err(CommitError::ReplacedCleanupFailed {
                dest: dest.path,
                source,
            }),
            (Err(source), leftover) => Err(CommitError::ReplacedDurabilityUnknown {
                dest: dest.path,
                source,
                leftover,
            }),
        }
    }

    /// Syncs the staged file, sets its final mode and attributes, and syncs it again. No writes may
    /// follow.
    ///
    /// The first sync can take long. Until it is complete the file stays private, so that no other
    /// user can open it, also if this process is killed.
    pub(crate) fn finish(&self, durability: Durability) -> Result<(), (CommitStep, io::Error)> {
        let sync = || sys::sync(self.file(), durability).map_err(|error| (CommitStep::Sync, error));
        if self.mode != STAGED_MODE || self.preserve.anything() {
            sync()?;
        }
        self.give_attributes()
            .map_err(|error| (CommitStep::Attributes, error))?;
        sync()
    }

    fn give_attributes(&self) -> io::Result<()> {
        let Self {
            staged,
            dest,
            preserve,
            mode,
            ..
        } = self;
        let lost =
            preserve::apply(staged.file(), dest, *preserve, *mode).map_err(io::Error::other)?;
        // The destination may have changed since `not_preserved` was returned to the caller.
        let is_known = |lost: &NotPreserved| {
            let mut known = self.not_preserved.iter();
            known.any(|known| known.attribute == lost.attribute)
        };
        match lost.into_iter().find(|lost| !is_known(lost)) {
            Some(unknown) => Err(io::Error::other(unknown)),
            None => Ok(()),
        }
    }

    /// Removes the staged file. Dropping the writer does so too, but ignores errors.
    ///
    /// # Errors
    /// Returns a [`Leftover`] that names the file that could not be removed.
    pub fn discard(self) -> Result<(), Leftover> {
        self.staged.discard()
    }
}

impl Options {
    /// Stages a new file for `dest`.
    ///
    /// First completes the group commits of killed processes in the directory, and removes the
    /// orphaned staged files of this destination. [`sweep`](crate::sweep()) removes those of all
    /// destinations.
    ///
    /// # Errors
    /// Returns an [`OpenError`]. No file is left behind except those that the error names.
    pub fn open(&self, dest: impl AsRef<Path>) -> Result<AtomicWriter, OpenError> {
        AtomicWriter::open_with(dest.as_ref(), self)
    }
}

/// State of the replaced file after the rename.
enum Replaced {
    /// Unlinked. The name of the staged file may remain.
    Removed(Option<Leftover>),
    /// Linked under the name of the staged file.
    Exchanged(StagedFile),
}

/// Renames the staged file onto the destination, or exchanges it with `old` if that is given and
/// the file system supports it.
fn publish(
    staged: &mut StagedFile,
    dest: &Destination,
    no_clobber: bool,
    old: Option<LockedFile>,
) -> Result<Replaced, PublishError> {
    if let Some(old) = old {
        match staged.exchange(old) {
            Ok(old) => return Ok(Replaced::Exchanged(old)),
            // The exchange changed nothing: fall back to a rename.
            Err(PublishError::NotPublished(_)) => {}
            Err(unknown @ PublishError::Unknown { .. }) => return Err(unknown),
        }
    }
    staged
        .publish(&dest.dir, &dest.name, no_clobber)
        .map(Replaced::Removed)
}

impl Write for AtomicWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file_mut().write(buf)
    }

    fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.file_mut().write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file_mut().flush()
    }
}

impl Seek for AtomicWriter {
    fn seek(&mut self, pos: SeekFrom) -> io::Result<u64> {
        self.file_mut().seek(pos)
    }
}

fn open_staging(path: &Path, dest: &Destination) -> Result<Arc<Directory>, OpenError> {
    let staging = Directory::open(path).map_err(|source| OpenError::OpenDirectory {
        path: path.to_owned(),
        source,
    })?;
    if staging.stat.id.device != dest.dir.stat.id.device {
        return Err(cross_file_system(&dest.dir, &staging));
    }
    Ok(Arc::new(staging))
}

fn cross_file_system(dest: &Directory, staging: &Directory) -> OpenError {
    OpenError::CrossFileSystem {
        dest_dir: dest.path().to_owned(),
        staging_dir: staging.path().to_owned(),
    }
}

/// Converts the error of a preflight.
fn explain(
    error: PreflightError,
    path: &Path,
    dest: &Directory,
    staging: &Directory,
    options: &Options,
) -> OpenError {
    let source = match error {
        PreflightError::Io(source) => source,
        PreflightError::Leftover(source) => {
            return OpenError::Leftover {
                path: path.to_owned(),
                source,
            };
        }
    };
    if source.kind() == io::ErrorKind::CrossesDevices {
        cross_file_system(dest, staging)
    } else if options.no_clobber && has_no_links(&source) {
        OpenError::NoClobberUnsupported {
            path: path.to_owned(),
            source,
        }
    } else if staging.stat.id == dest.stat.id {
        not_staged(staging, path, source)
    } else {
        OpenError::io("stage a file for", path, source)
    }
}

/// Sets the mode and the attributes as the commit will, and resets them to those of a staged file.
///
/// The commit sets them after the last write: writing drops the set-id bits, and a file that its
/// owner may not write cannot be reopened for direct I/O.
fn try_attributes(
    staged: &StagedFile,
    dest: &Destination,
    options: &Options,
) -> Result<Vec<NotPreserved>, OpenError> {
    let Options { preserve, mode, .. } = *options;
    let path = &dest.path;
    let set_mode = |source| OpenError::io("set the mode of the file staged for", path, source);
    let owner = stat_of(staged.file()).map_err(set_mode)?.uid;
    let given = preserve::apply(staged.file(), dest, preserve, mode);
    let not_preserved = given.map_err(|source| match (&source.attribute, preserve) {
        (Attribute::Mode, _) => set_mode(source.source),
        _ => OpenError::NotPreserved {
            path: path.clone(),
            source,
        },
    })?;
    // Until the commit the file is accessible to this user alone.
    if stat_of(staged.file()).map_err(set_mode)?.uid != owner {
        let owner = Some(Uid::from_raw(owner));
        retry(|| fchown(staged.file(), owner, None)).map_err(set_mode)?;
    }
    sys::set_mode(staged.file(), STAGED_MODE).map_err(set_mode)?;
    Ok(not_preserved)
}

fn not_staged(dir: &Directory, path: &Path, source: io::Error) -> OpenError {
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::NotWritable {
                path: path.to_owned(),
                dir: dir.path().to_owned(),
                source,
            }
        }
        _ => OpenError::io("stage a file for", path, source),
    }
}

fn destination_changed(staged: StagedFile, dest: Destination) -> CommitError {
    CommitError::DestinationChanged {
        dest: dest.path,
        leftover: staged.discard().err(),
    }
}

fn not_replaced(
    staged: StagedFile,
    dest: Destination,
    step: CommitStep,
    source: io::Error,
) -> CommitError {
    CommitError::NotReplaced {
        dest: dest.path,
        step,
        source,
        leftover: staged.discard().err(),
    }
}
