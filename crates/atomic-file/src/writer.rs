//! Staging one file and committing it.

mod commit;
mod open;

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::fcntl::OFlag;

use crate::attribute::NotPreserved;
use crate::destination::Destination;
use crate::durability::Durability;
use crate::error::{Leftover, OpenError};
use crate::options::AtomicWriterOptions;
use crate::preserve::Preserve;
use crate::staged_file::StagedFile;
use crate::version::FileVersion;

/// A staged file that atomically replaces its destination on [`commit`](Self::commit).
///
/// Until the commit, it has a name of its own in the destination's directory. Dropping the writer
/// removes it, also during a panic.
///
/// The type is `Send` and `Sync`: threads may share a writer and call
/// [`write_all_at`](Self::write_all_at), and any thread may commit it.
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
/// The compiler warns about a writer that is not used:
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// atomic_file::AtomicWriter::open("memory.bin")?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a writer that is dropped leaves the destination unchanged: commit it"]
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
    /// Stages a new file for `dest` with the default [`AtomicWriterOptions`].
    ///
    /// # Errors
    /// Returns an [`OpenError`]. No file is left behind except those that the error names.
    pub fn open(dest: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::options().open(dest)
    }

    /// Returns a builder for non-default options.
    pub fn options() -> AtomicWriterOptions {
        AtomicWriterOptions::default()
    }

    /// Returns the destination as it was given to `open`.
    #[must_use]
    pub fn dest_path(&self) -> &Path {
        &self.dest.path
    }

    /// Opens the file that a commit would replace, for reading, or returns `None` if there is none.
    /// A destination that is not a regular file counts as none.
    ///
    /// The file is looked up in the directory that was opened with this writer, as by the commit,
    /// also if [`dest_path`](Self::dest_path) leads elsewhere by now. Waits neither for a FIFO nor
    /// for a lease.
    ///
    /// # Errors
    /// Returns the errors of `fstatat(2)` and `openat(2)`.
    pub fn open_replaced(&self) -> io::Result<Option<File>> {
        let Destination { dir, name, .. } = &self.dest;
        match dir.entry(name)? {
            Some(entry) if entry.is_file() => dir.open_for(OFlag::O_RDONLY, name).map(Some),
            Some(_) | None => Ok(None),
        }
    }

    /// Returns the path of the staged file: the destination's directory as given (or the directory
    /// that its link leads to), and the name of the staged file.
    ///
    /// A relative path stays relative. The writer does not use this path, so changing the current
    /// directory or renaming the destination's directory is harmless. The path then leads
    /// elsewhere, but [`file`](Self::file) does not.
    #[must_use]
    pub fn staged_path(&self) -> &Path {
        self.staged.path()
    }

    /// Returns the attributes of the replaced file that the new file will lack, if
    /// [`preserve`](AtomicWriterOptions::preserve) requests them [if
    /// permitted](Preserve::if_permitted).
    #[must_use]
    pub fn not_preserved(&self) -> &[NotPreserved] {
        &self.not_preserved
    }

    /// Returns whether the staged file is a replaced file that [`AtomicWriterOptions::recycle`]
    /// reused.
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

    /// Removes the staged file. Dropping the writer does so too, but ignores errors.
    ///
    /// # Errors
    /// Returns a [`Leftover`] that names the file that could not be removed.
    pub fn discard(self) -> Result<(), Leftover> {
        self.staged.discard()
    }
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
