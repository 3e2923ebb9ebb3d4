//! Replacing a file in one call.

use std::io;
use std::path::Path;

use crate::options::AtomicWriterOptions;
use crate::preserve::Preserve;
use crate::writer::AtomicWriter;

/// Replaces the file at `path` by one with these contents, atomically and durably. Creates the file
/// if it does not exist.
///
/// The owner, group, mode, access control list and extended attributes of the replaced file are
/// preserved as far as this process is permitted to. A new file has the mode 0600. Use
/// [`AtomicWriterOptions::write`] for another mode or other options.
///
/// # Errors
/// Returns an error of the kind that the failed system call had. If
/// [`io::Error::downcast`] returns a [`CommitError`](crate::CommitError),
/// [`replaced`](crate::CommitError::replaced) states whether the new file is in place. After any
/// other error, the file is unchanged.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("config.toml");
/// atomic_file::write(&path, "answer = 41\n")?;
/// atomic_file::write(&path, "answer = 42\n")?;
/// assert_eq!(std::fs::read_to_string(&path)?, "answer = 42\n");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn write(path: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> io::Result<()> {
    let preserve = Preserve::all().if_permitted(true);
    let options = AtomicWriter::options().preserve(preserve);
    options.write(path, contents)
}

impl AtomicWriterOptions {
    /// Replaces the file at `path` by one with these contents: opens a writer, writes and commits.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open), of the write and of
    /// [`commit`](AtomicWriter::commit), as [`write()`] does.
    ///
    /// # Examples
    /// ```
    /// use atomic_file::AtomicWriter;
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("config.toml");
    ///
    /// AtomicWriter::options().mode(0o644).write(&path, "answer = 42\n")?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn write(&self, path: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> io::Result<()> {
        let contents = contents.as_ref();
        let writer = self.open(path)?;
        if writer.recycled() {
            // A recycled file has its old length.
            writer.file().set_len(contents.len() as u64)?;
        }
        writer.write_all_at(contents, 0)?;
        Ok(writer.commit()?)
    }
}
