//! One file, staged and put in place.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use crate::destination::{Destination, check_directory, check_replaceable};
use nix::unistd::{Uid, fchown};

use crate::directory::{Directory, Stat, stat_of};
use crate::error::{CommitError, CommitStep, Leftover, OpenError};
use crate::options::{Durability, Options};
use crate::preflight::{PreflightError, preflight};
use crate::preserve::{self, Attribute, NotPreserved, Preserve};
use crate::recover::{list, recover_pending_for};
use crate::recycle;
use crate::rename::{PublishError, has_no_links};
use crate::staged_file::{PREFIX, STAGED_MODE, StagedFile, remove_leftovers};
use crate::sys;
use crate::version::FileVersion;

/// A new file in the making, that [`commit`](Self::commit) puts in the place of another at once and whole.
///
/// Until then it has a name of its own in the destination's directory. Dropping the writer, also by a panic,
/// removes it.
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
    /// At most how many bytes of the replaced file are kept as a spare.
    recycle: Option<u64>,
    recycled: bool,
}

impl AtomicWriter {
    /// Stages a new file that is to replace, or become, `dest`, with the defaults of [`Options`].
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing is left behind but what the error names.
    pub fn open(dest: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::options().open(dest)
    }

    /// What else can be chosen.
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
        // After the recovery, which may have replaced it.
        if let Some(version) = &options.replace_only {
            let is_there = version.is_at(&dest);
            if !is_there.map_err(|source| OpenError::io("inspect", path, source))? {
                return Err(OpenError::DestinationChanged {
                    path: path.to_owned(),
                });
            }
            let turn = version.lock_for_commit();
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
        // So does the commit, beside the staged file: a limit on descriptors is found now.
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

    /// The destination, as it was given to `open`.
    #[must_use]
    pub fn dest_path(&self) -> &Path {
        &self.dest.path
    }

    /// Where the file is staged: the destination's directory as given (or where its link leads to), and the stage's name.
    ///
    /// A relative path stays relative. The writer itself does not use it, so changing the current directory or renaming
    /// the destination's does no harm to it; but then this path leads elsewhere, and [`file`](Self::file) does not.
    #[must_use]
    pub fn temp_path(&self) -> &Path {
        self.staged.path()
    }

    /// What of the replaced file the new file will not have, though
    /// [`preserve`](Options::preserve) asks for it [if permitted](Preserve::if_permitted).
    #[must_use]
    pub fn not_preserved(&self) -> &[NotPreserved] {
        &self.not_preserved
    }

    /// Whether the staged file is one that was replaced earlier and has that one's length and bytes still, on request of
    /// [`Options::recycle`].
    ///
    /// Then whoever writes must set the length, and overwrite or wipe all the rest: what is left of the old bytes would be committed
    /// with the new. Else the staged file is new, and empty.
    #[must_use]
    pub fn recycled(&self) -> bool {
        self.recycled
    }

    /// The staged file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        self.staged.file()
    }

    /// The staged file, open for reading and writing.
    ///
    /// A commit refuses to go on where another `File` was put in its place.
    #[must_use]
    pub fn file_mut(&mut self) -> &mut File {
        self.staged.file_mut()
    }

    /// Writes all of `buf` at `offset` bytes from the file's start, from any thread, whatever the file's position.
    ///
    /// # Errors
    /// Those of `pwrite(2)`; interrupted and short writes are gone on with. What was written before the error stays.
    pub fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file().write_all_at(buf, offset)
    }

    /// Syncs the file, renames it onto the destination, and syncs the directory.
    ///
    /// How much of that is for [`Durability`] to say. Of several writers to one destination, the last to commit wins. While a group of
    /// which the destination is one is being completed, this waits.
    /// An empty file is committed like any other.
    ///
    /// # Errors
    /// [`CommitError`] says which of the two files the destination is now. It is never a mixture.
    pub fn commit(self) -> Result<(), CommitError> {
        // Before what takes its time.
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
        // An older group, completed only after us, would replace what we commit now.
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
        // Only a directory that is synced keeps the old file from coming back as the destination once it is overwritten.
        let old = recycle
            .filter(|_| durability == Durability::Full && !no_clobber)
            .and_then(|max_bytes| recycle::lock_old(&dest.dir, &dest.name, max_bytes));
        // From here to the rename, no other writer that has read the same file replaces it.
        let compare = |version| -> io::Result<_> {
            let turn = FileVersion::lock_for_commit(version)?;
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
        // A group may have been published between the last look and the rename, and its owner have
        // died. Its record says what was here then, so that no recovery replaces what is here now;
        // but one that looked before the rename must end before this commit returns. Other
        // failures do not concern this file.
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
            (Ok(()), Some(source)) => Err(CommitError::ReplacedStageLeft {
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

    /// Gives the staged file, which no one writes to any more, what it is to have as the destination,
    /// and syncs it.
    ///
    /// Its bytes are synced before, which can take long: until then it is this user's alone, and no
    /// other can open it or has it left behind by a kill.
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
        // The destination may have changed since the caller was informed of what is lost.
        let is_known = |lost: &NotPreserved| {
            let mut known = self.not_preserved.iter();
            known.any(|known| known.attribute == lost.attribute)
        };
        match lost.into_iter().find(|lost| !is_known(lost)) {
            Some(unknown) => Err(io::Error::other(unknown)),
            None => Ok(()),
        }
    }

    /// Removes the staged file. What dropping does too, but this says whether it worked.
    ///
    /// # Errors
    /// [`Leftover`] names the file that could not be removed.
    pub fn discard(self) -> Result<(), Leftover> {
        self.staged.discard()
    }
}

/// What became of the old file.
enum Replaced {
    /// Its name is gone; the stage's may have been left.
    Removed(Option<Leftover>),
    /// It has the stage's name.
    Exchanged(StagedFile),
}

/// Puts the stage in place, in exchange for `old` where that is given and the file system can.
fn publish(
    staged: &mut StagedFile,
    dest: &Destination,
    no_clobber: bool,
    old: Option<StagedFile>,
) -> Result<Replaced, PublishError> {
    if let Some(old) = old {
        match staged.exchange(old) {
            Ok(old) => return Ok(Replaced::Exchanged(old)),
            // Nothing has changed: rename, and let that have the last word.
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

/// What a failed rehearsal means.
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

/// Tries what the commit will do: the mode and the attributes that are asked for are set once nothing
/// is written any more. Writing drops the set-id bits, and a file that its owner may not write cannot
/// be opened again for direct I/O.
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
    // From here to the commit it is this user's alone.
    if stat_of(staged.file()).map_err(set_mode)?.uid != owner {
        let owner = Some(Uid::from_raw(owner));
        sys::retry(|| fchown(staged.file(), owner, None)).map_err(set_mode)?;
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
