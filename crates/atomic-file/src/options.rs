//! Options of a writer.

use std::path::PathBuf;

use crate::destination::Symlinks;
use crate::durability::Durability;
use crate::preserve::Preserve;
use crate::version::FileVersion;

/// Options for opening an [`AtomicWriter`](crate::AtomicWriter), returned by
/// [`AtomicWriter::options`](crate::AtomicWriter::options).
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
#[must_use = "options do nothing until `open`"]
pub struct AtomicWriterOptions {
    pub(crate) mode: u32,
    pub(crate) durability: Durability,
    pub(crate) no_clobber: bool,
    pub(crate) staging_dir: Option<PathBuf>,
    pub(crate) symlinks: Symlinks,
    pub(crate) recycle: Option<u64>,
    pub(crate) preserve: Preserve,
    pub(crate) replace_only: Option<FileVersion>,
}

impl Default for AtomicWriterOptions {
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

impl AtomicWriterOptions {
    /// Sets the permission bits of the new file. The default is `0o600`. Neither the umask nor the
    /// replaced file changes them (but see [`preserve`](Self::preserve)). Bits above `0o7777` are
    /// ignored.
    ///
    /// An access control list that the file inherits from its directory is removed (on Linux),
    /// unless a list is preserved.
    ///
    /// Until the commit, the staged file has the mode `0o600`. No other user can open it, and its
    /// owner can reopen it for direct I/O. The commit syncs the bytes, sets the mode, and syncs the
    /// file again. It sets the mode last because writing drops the set-id bits.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode & 0o7777;
        self
    }

    /// Selects the attributes of the replaced file that the new file receives. The default is none.
    pub fn preserve(mut self, preserve: Preserve) -> Self {
        self.preserve = preserve;
        self
    }

    /// Sets the durability that [`commit`](crate::AtomicWriter::commit) waits for. The default is
    /// [`Durability::Full`].
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Sets whether to fail instead of replacing an existing destination. The default is `false`.
    ///
    /// `open` checks this, and the commit checks it again atomically (`RENAME_NOREPLACE`,
    /// `RENAME_EXCL`, or `link` if the file system supports neither). `open` fails on a file system
    /// that supports none of these calls.
    pub fn no_clobber(mut self, no_clobber: bool) -> Self {
        self.no_clobber = no_clobber;
        self
    }

    /// Replaces only this version of the destination. Use it for bytes that were derived from that
    /// version.
    ///
    /// If the destination was replaced, removed or written to, [`open`](Self::open) fails with
    /// [`OpenError::DestinationChanged`](crate::OpenError::DestinationChanged), and the commit with
    /// [`CommitError::DestinationChanged`](crate::CommitError::DestinationChanged). Both replace
    /// nothing.
    ///
    /// If several writers with this option have the same version, one of them replaces it, on file
    /// systems with locks: they hold a `flock` on the old file from the comparison to the rename.
    /// **Any process that may read the file can hold such a lock**, also the command `flock FILE`.
    /// If one holds it for more than about a second, `open` and the commit fail with an error that
    /// states this. The commit of a writer *without* this option is detected until the comparison
    /// just before the rename. If it falls between the two, it is replaced, because no system call
    /// compares and renames in one step. [`FileVersion`] lists the writes in place that are missed.
    ///
    /// With [`Symlinks::Replace`], a link never matches the version of its target. The old file
    /// stays open, so it is not kept for [recycling](Self::recycle). A writer with this option
    /// cannot join an [`AtomicGroup`](crate::AtomicGroup).
    pub fn replace_only(mut self, version: FileVersion) -> Self {
        self.replace_only = Some(version);
        self
    }

    /// Stages the file in `dir` instead of the destination's directory.
    ///
    /// Both directories must be on one file system, so that a rename is possible. `open` compares
    /// their devices and renames an empty file from one to the other. This also detects bind mounts
    /// and project quotas before data is written.
    pub fn staging_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.staging_dir = Some(dir.into());
        self
    }

    /// Sets the handling of a destination that is a symbolic link. The default is
    /// [`Symlinks::Follow`].
    pub fn symlinks(mut self, symlinks: Symlinks) -> Self {
        self.symlinks = symlinks;
        self
    }

    /// Keeps the file that [`commit`](crate::AtomicWriter::commit) replaces, and reuses it as the
    /// staged file of the next writer to the same destination. Use this for large files that are
    /// replaced repeatedly: overwriting allocated blocks avoids freeing and allocating them.
    ///
    /// **A recycled file has its old bytes.**
    /// [`AtomicWriter::recycled`](crate::AtomicWriter::recycled) returns whether the staged file is
    /// recycled.
    ///
    /// At most one file per destination is kept, in the same directory, and only if at most
    /// `max_bytes` bytes are allocated to it. The next writer with this option reuses it. The next
    /// writer without it removes the file, and so does [`sweep`](crate::sweep()).
    ///
    /// A file that another process has open or mapped, or that has another name, never changes
    /// (bind mounts of the file and descriptors of `O_PATH` are not detected; see the
    /// [limitations](crate#limitations)): a file is kept and reused only if it has a single link
    /// and the kernel grants a lease on it. A file that differs from a new one in owner, group or
    /// extended attributes is not reused either. In these cases the old file is removed as without
    /// this option, which is not an error. The same applies:
    /// - to a file on which another process holds a `flock`,
    /// - on file systems other than ext4, XFS, btrfs and tmpfs, and on systems other than Linux,
    /// - with a durability weaker than [`Full`](Durability::Full), because a power loss must not
    ///   restore the old file,
    /// - with a [`staging_dir`](Self::staging_dir) other than the destination's directory, and in a
    ///   group commit.
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
}
