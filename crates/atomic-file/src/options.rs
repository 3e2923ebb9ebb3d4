//! How a file is to be replaced.

use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::preserve::Preserve;
use crate::version::FileVersion;
use crate::writer::AtomicWriter;

/// What a commit waits for before it says that it is done. Ordered from weakest to strongest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// Nothing. The replacement is atomic for every process on this machine, also when this one is killed, but a power
    /// loss or a crash of the system soon after may leave an empty or torn file.
    None,
    /// The file's bytes reach the medium before its new name does, so that a power loss leaves the old file whole or
    /// the new one whole; which of the two is open for a while.
    ///
    /// On macOS `F_BARRIERFSYNC`. Linux has no call that orders without flushing, so there the file is synced exactly
    /// as for [`Full`](Self::Full), and only the sync of the directory is saved.
    Barrier,
    /// When commit has returned, the new file is there after a power loss too.
    ///
    /// `fsync` of the file and of its directory; on macOS `F_FULLFSYNC`, which also empties the drive's own cache, or
    /// `fsync` where the file system has nothing better.
    #[default]
    Full,
}

/// What to do where the destination is a symbolic link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Symlinks {
    /// Replace the file the link leads to, and leave the link: what `open(2)` would have written to.
    ///
    /// The default, because the other choice loses something without a word: the link of an operator who put the
    /// files on a larger disk, and the room on the small one. A link that leads nowhere is an error, as it is most
    /// often a disk that is not mounted. A link in a directory that [others may write to](crate::others_may_write) is
    /// followed only where that is a sticky one (`/tmp`) and the link belongs to this user or to the directory's owner, as with
    /// Linux's `fs.protected_symlinks`.
    #[default]
    Follow,
    /// Replace the link itself, dangling or not, by a regular file; what it led to is left alone. What `rename(2)`
    /// does, and the right choice where others may write to the directory.
    Replace,
}

/// Options for opening an [`AtomicWriter`]; made by [`AtomicWriter::options`].
///
/// # Examples
/// ```
/// use std::io::Write;
/// use atomic_file::{AtomicWriter, Durability};
/// # let dir = tempfile::tempdir()?;
/// # let dest = dir.path().join("config.toml");
///
/// let mut writer = AtomicWriter::options()
///     .mode(0o644)
///     .durability(Durability::Barrier)
///     .no_clobber(true)
///     .open(&dest)?;
/// writer.write_all(b"answer = 42\n")?;
/// writer.commit()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Options {
    pub(crate) mode: u32,
    pub(crate) durability: Durability,
    pub(crate) no_clobber: bool,
    pub(crate) staging_dir: Option<PathBuf>,
    pub(crate) symlinks: Symlinks,
    pub(crate) recycle: Option<u64>,
    pub(crate) preserve: Preserve,
    pub(crate) replace_only: Option<FileVersion>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: 0o600,
            durability: Durability::default(),
            no_clobber: false,
            staging_dir: None,
            symlinks: Symlinks::default(),
            recycle: None,
            preserve: Preserve::nothing(),
            replace_only: None,
        }
    }
}

impl Options {
    /// The permission bits of the new file, `0o600` unless told otherwise. Exactly these, whatever the umask and
    /// whatever the replaced file had (but see [`preserve`](Self::preserve)); bits above `0o7777` are ignored.
    ///
    /// Nor has it an access control list, unless one is preserved: one that its directory has new
    /// files inherit is removed (on Linux).
    ///
    /// Until the commit the staged file has the mode `0o600`, so that no other user can open it, and
    /// its owner can open it again for direct I/O. The commit syncs the file's bytes, then sets the
    /// mode, as writing drops the set-id bits, and syncs the file again.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode & 0o7777;
        self
    }

    /// Which attributes of the replaced file the new file gets; none by default.
    pub fn preserve(mut self, preserve: Preserve) -> Self {
        self.preserve = preserve;
        self
    }

    /// What [`commit`](AtomicWriter::commit) waits for; [`Durability::Full`] unless told otherwise.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Whether to fail rather than replace a destination that exists.
    ///
    /// Checked when opening, and again, atomically, by the commit itself (`RENAME_NOREPLACE`, `RENAME_EXCL`, or `link`
    /// where the file system lacks those). A file system with none of them is refused when opening, by trying.
    pub fn no_clobber(mut self, no_clobber: bool) -> Self {
        self.no_clobber = no_clobber;
        self
    }

    /// Replaces this version of the destination and no other; for bytes that were made from it.
    ///
    /// Where the destination is another file, is gone, or was written to, [`open`](Self::open) fails with
    /// [`OpenError::DestinationChanged`], and the commit with
    /// [`CommitError::DestinationChanged`](crate::CommitError::DestinationChanged). Both replace nothing.
    ///
    /// Of the writers with this option that have the same version, one replaces it, on file systems with
    /// locks: they take an `flock` of the old file for the time of the last look and the rename. A
    /// program that holds such a lock for longer than about a second makes `open` and the commit fail. The commit of a writer *without* this option is noticed until that last look,
    /// just before the rename; in the time between the two it is replaced, as no system call does both in one step.
    ///
    /// With [`Symlinks::Replace`], a link is no version of the file that it leads to.
    /// The old file is open meanwhile, so it is not kept for [recycling](Self::recycle). Such a writer cannot join an
    /// [`AtomicGroup`](crate::AtomicGroup).
    pub fn replace_only(mut self, version: FileVersion) -> Self {
        self.replace_only = Some(version);
        self
    }

    /// Stages in `dir` rather than beside the destination.
    ///
    /// Both must be on one file system, or else no rename leads from one to the other. Opening compares the
    /// two directories' devices and then really renames an empty file across, which also finds bind mounts and project
    /// quotas: nothing is written only to be refused by the commit.
    pub fn staging_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.staging_dir = Some(dir.into());
        self
    }

    /// What to do where the destination is a symbolic link; [`Symlinks::Follow`] unless told otherwise.
    pub fn symlinks(mut self, symlinks: Symlinks) -> Self {
        self.symlinks = symlinks;
        self
    }

    /// Keeps the file that [`commit`](AtomicWriter::commit) replaces, to be the stage of the next writer to the same destination:
    /// blocks that are overwritten need be neither freed nor found. For large files replaced again and again.
    ///
    /// **Such a stage has its old bytes**: see [`AtomicWriter::recycled`], which says whether it does.
    ///
    /// One file is kept per destination, beside it, and only if it has at most `max_bytes` bytes allocated. The next writer
    /// with this option takes it, the next without removes it, and so does [`sweep`](crate::sweep()).
    ///
    /// Nobody sees a file change that they have open or mapped, or know by another name: it is kept and taken only
    /// if it has one name and the kernel grants a lease on it, which it does where nobody else has it open. Nor is one that a new
    /// file would not be like: of another owner or group, or with extended attributes. In all these cases, and
    /// - on another file system than ext4, XFS, btrfs and tmpfs, or another system than Linux,
    /// - with a weaker durability than [`Full`](Durability::Full), as the old file must not be what a power loss brings back,
    /// - with a [`staging_dir`](Self::staging_dir) elsewhere than beside the destination, and in a group's commit,
    ///
    /// the old file goes as it would without this option, which is no error.
    ///
    /// # Examples
    /// ```
    /// use atomic_file::AtomicWriter;
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("vm.mem");
    ///
    /// for save in 1..=3 {
    ///     let writer = AtomicWriter::options().recycle(1 << 30).open(&dest)?;
    ///     if writer.recycled() {
    ///         println!("save {save} overwrites what save {} wrote", save - 2);
    ///     }
    ///     writer.file().set_len(8192)?;
    ///     writer.write_all_at(&[save; 8192], 0)?; // all of it
    ///     writer.commit()?;
    /// }
    /// assert_eq!(std::fs::read(&dest)?, [3; 8192]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn recycle(mut self, max_bytes: u64) -> Self {
        self.recycle = Some(max_bytes);
        self
    }

    /// Stages a new file that is to replace, or become, `dest`.
    ///
    /// First completes the group commits that killed processes left behind in the directory, and removes what killed
    /// writers to this very destination left. [`sweep`](crate::sweep()) does so for all destinations.
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing is left behind but what the error names.
    pub fn open(&self, dest: impl AsRef<Path>) -> Result<AtomicWriter, OpenError> {
        AtomicWriter::open_with(dest.as_ref(), self)
    }
}
