//! Opening a writer: all checks before data is written.

use std::io;
use std::path::Path;
use std::sync::Arc;

use nix::unistd::{Uid, fchown};

use super::AtomicWriter;
use crate::attribute::{Attribute, NotPreserved};
use crate::destination::{Destination, check_directory, check_replaceable};
use crate::directory::Directory;
use crate::error::OpenError;
use crate::names::PREFIX;
use crate::options::AtomicWriterOptions;
use crate::preflight::{PreflightError, preflight};
use crate::preserve;
use crate::recover::recover_pending_for;
use crate::recycle;
use crate::rename::has_no_links;
use crate::retry::retry;
use crate::staged_file::{STAGED_MODE, StagedFile};
use crate::stat::{Stat, stat_of};
use crate::sweep::remove_leftovers;
use crate::{sys, trace};

impl AtomicWriterOptions {
    /// Stages a new file for `dest`.
    ///
    /// First completes the group commits of killed processes that include this destination, and at
    /// most 16 others in the directory. [`recover`](crate::recover) completes all. Then removes the
    /// orphaned staged files of this destination. [`sweep`](crate::sweep()) removes those of all
    /// destinations.
    ///
    /// # Errors
    /// Returns an [`OpenError`]. No file is left behind except those that the error names.
    pub fn open(&self, dest: impl AsRef<Path>) -> Result<AtomicWriter, OpenError> {
        AtomicWriter::open_with(dest.as_ref(), self)
    }
}

impl AtomicWriter {
    fn open_with(path: &Path, options: &AtomicWriterOptions) -> Result<Self, OpenError> {
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
        if elsewhere && options.recycle.is_some() {
            let why = io::Error::other("the file is staged in another directory");
            trace::old_file_not_kept(path, &why);
        }
        let recycled = reused.is_some();
        let staged = reused
            .map_or_else(|| StagedFile::create(&staging, &dest.name), Ok)
            .map_err(|source| not_staged(&staging, path, source))?;
        trace::staged(path, staged.path(), recycled);
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
    options: &AtomicWriterOptions,
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
    options: &AtomicWriterOptions,
) -> Result<Vec<NotPreserved>, OpenError> {
    let AtomicWriterOptions { preserve, mode, .. } = *options;
    let path = &dest.path;
    let set_mode = |source| OpenError::io("set the mode of the file staged for", path, source);
    let owner = stat_of(staged.file()).map_err(set_mode)?.uid.raw();
    let given = preserve::apply(staged.file(), dest, preserve, mode);
    let not_preserved = given.map_err(|source| match (&source.attribute, preserve) {
        (Attribute::Mode, _) => set_mode(source.source),
        _ => OpenError::NotPreserved {
            path: path.clone(),
            source,
        },
    })?;
    // Until the commit the file is accessible to this user alone.
    // By number: no attribute is set to an id that is not mapped.
    if stat_of(staged.file()).map_err(set_mode)?.uid.raw() != owner {
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
