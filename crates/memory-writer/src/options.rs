//! How a snapshot is to be taken, and how it is watched meanwhile.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use atomic_file::{AtomicWriter, Durability, FileVersion, Preserve, Symlinks};
use sparse_file::{Engine, WriteOptions};

use crate::error::SnapshotError;
use crate::layout::Layout;
use crate::needed::Skip;
use crate::writer::MemoryWriter;

/// How far one `write_full` or `write_diff` has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes written so far, or [skipped](Options::skip_zeros).
    pub bytes_done: u64,
    /// Bytes to write or skip in all.
    pub bytes_total: u64,
    /// The page of the memory file, in bytes.
    pub page_size: u64,
}

impl Progress {
    /// Pages of the memory file written so far, whole ones.
    #[must_use]
    pub fn pages_done(&self) -> u64 {
        self.bytes_done / self.page_size
    }

    /// Pages of the memory file to write in all.
    #[must_use]
    pub fn pages_total(&self) -> u64 {
        self.bytes_total / self.page_size
    }
}

/// Ends a write from another thread: all clones are one token.
///
/// The write under way ends once the chunks in flight are done, with [`SnapshotError::Cancelled`], a later one at once; the writer
/// then refuses to commit, and dropping it removes the staged file. A commit under way is not interrupted.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that nothing has cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels, for good.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether anything has cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Options for a [`MemoryWriter`]; made by [`MemoryWriter::options`]. The defaults are those of [`MemoryWriter::open`].
///
/// # Examples
/// ```
/// use memory_writer::{CancelToken, MemoryWriter};
///
/// # let dir = tempfile::tempdir()?;
/// # let dest = dir.path().join("full.mem");
/// let (progress, seen) = std::sync::mpsc::channel();
/// let cancel = CancelToken::new(); // clone it for the thread that may cancel
/// let mut writer = MemoryWriter::options()
///     .progress(move |progress_now| drop(progress.send(progress_now)))
///     .cancel(cancel.clone())
///     .open(&dest, 8 << 20, 4096)?;
/// writer.write_full(&vec![7; 8 << 20])?;
/// writer.commit()?;
/// assert_eq!(seen.iter().last().map(|last| last.pages_done()), Some(2048));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub struct Options {
    stage: atomic_file::Options,
    pub(crate) write: WriteOptions,
    pub(crate) skip: Skip,
    pub(crate) read_untouched: bool,
    pub(crate) layout: Layout,
    pub(crate) ram_start: Option<u64>,
    pub(crate) allow_ambiguous: bool,
    pub(crate) watch: Watch,
}

/// Who is told of progress, and who may cancel.
pub(crate) struct Watch {
    progress: Option<Box<dyn FnMut(Progress) + Send>>,
    cancel: CancelToken,
}

impl Watch {
    pub(crate) fn tell(&mut self, progress: Progress) -> ControlFlow<()> {
        if let Some(callback) = &mut self.progress {
            callback(progress);
        }
        if self.cancel.is_cancelled() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

impl Options {
    pub(crate) fn new() -> Self {
        Self {
            stage: AtomicWriter::options(),
            write: WriteOptions::new(),
            skip: Skip::default(),
            read_untouched: false,
            layout: Layout::Raw,
            ram_start: None,
            allow_ambiguous: false,
            watch: Watch {
                progress: None,
                cancel: CancelToken::new(),
            },
        }
    }

    /// The guest-physical address of the memory file's first byte, at which every bitmap given to
    /// [`write_diff`](MemoryWriter::write_diff) and every epoch that is released must start. By
    /// default it is what the first of these says, and 0 for a file that is committed without any.
    pub fn ram_start(mut self, address: u64) -> Self {
        self.ram_start = Some(address);
        self
    }

    /// How the pages stand in the file, and whether it is sealed by a footer: [`Layout::Raw`] unless told otherwise.
    ///
    /// Sealing sums every byte as it passes by, of the copy that is written; it takes 24 bytes of memory for each run of pages, up to three times that while a full dump's list of them grows, and 32 for each MiB of RAM that
    /// is written, twice that at the commit.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Whether to write a raw diff that could not be read back by its holes: false unless given.
    ///
    /// `memory-image` tells the pages of a raw diff from its holes, and only where they are known to
    /// be reported correctly: on ext4, XFS, btrfs and tmpfs of Linux, and on overlayfs over the first
    /// three, in pages of at least a block, if at least one page is clean. Anywhere else (FUSE,
    /// network file systems, macOS)
    /// [`write_diff`](MemoryWriter::write_diff) refuses to write one: give it
    /// [`Layout::Sealed`] or [`Layout::Packed`], which say which pages they hold.
    ///
    /// For callers that keep the list of the pages themselves, and read the diff with
    /// `memory_image::Chain::push_pages`. The bytes of the pages are right in either case.
    pub fn allow_ambiguous_diff(mut self, allow: bool) -> Self {
        self.allow_ambiguous = allow;
        self
    }

    /// What `commit` waits for; [`Durability::Full`] unless told otherwise. With less, marks are
    /// [released](crate::MemoryWriter::commit_and_release) before the file is sure to survive a power loss.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.stage = self.stage.durability(durability);
        self
    }

    /// The permission bits of the snapshot, `0o600` unless told otherwise: guest memory holds secrets.
    pub fn mode(mut self, mode: u32) -> Self {
        self.stage = self.stage.mode(mode);
        self
    }

    /// Which of the replaced file's owner, group, mode, access control list and extended attributes the snapshot
    /// gets; none by default. See [`atomic_file::Preserve`].
    pub fn preserve(mut self, preserve: Preserve) -> Self {
        self.stage = self.stage.preserve(preserve);
        self
    }

    /// Whether to fail rather than replace a destination that exists; see [`atomic_file::Options::no_clobber`].
    pub fn no_clobber(mut self, no_clobber: bool) -> Self {
        self.stage = self.stage.no_clobber(no_clobber);
        self
    }

    /// Replaces this version of the destination and no other; see [`atomic_file::Options::replace_only`].
    ///
    /// For a snapshot that is made from the one it replaces: another writer's commit since then stays.
    pub fn replace_only(mut self, version: FileVersion) -> Self {
        self.stage = self.stage.replace_only(version);
        self
    }

    /// Stages in `dir`, which must be on the destination's file system; see [`atomic_file::Options::staging_dir`].
    pub fn staging_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.stage = self.stage.staging_dir(dir);
        self
    }

    /// What to do where the destination is a symbolic link; [`Symlinks::Follow`] unless told otherwise.
    pub fn symlinks(mut self, symlinks: Symlinks) -> Self {
        self.stage = self.stage.symlinks(symlinks);
        self
    }

    /// Overwrites the snapshot that the last commit replaced, if it has at most `max_bytes` bytes allocated and nobody has it: see
    /// [`atomic_file::Options::recycle`], which tells when it can't be had; then the file is a new one, which is no error.
    ///
    /// Faster where a large snapshot is replaced again and again, at the price of twice its space. The old bytes never show: what is not
    /// written is wiped by `commit`, or [`finish`](MemoryWriter::finish), and a diff is as sparse as in a new file. Takes
    /// memory of a bit per page, where pages are written.
    pub fn recycle(mut self, max_bytes: u64) -> Self {
        self.stage = self.stage.recycle(max_bytes);
        self
    }

    /// Leaves zeros out of full dumps: they are holes, or whatever stands for zeros on the file system, and read back the same.
    ///
    /// All of the RAM that was ever touched is read by this process to find them, at the speed of its
    /// memory. Runs of less than 32 KiB are written with what is around them, as leaving them out
    /// takes longer. RAM that the reader knows to be untouched is left out without reading it. What a
    /// reader doesn't hand out as memory is read twice, unless it is zero.
    ///
    /// For [`write_full`](MemoryWriter::write_full) only. A diff records a page that became zero as written: left out, it
    /// would be taken for one that did not change.
    pub fn skip_zeros(mut self, skip: bool) -> Self {
        self.skip.zeros = skip;
        self
    }

    /// Leaves out of full dumps, without reading it, the RAM that the reader knows that nobody wrote; see
    /// [`PageReader::populated`](page_reader::PageReader::populated), which says of which RAM that is known. It reads back as the same zeros.
    ///
    /// For [`write_full`](MemoryWriter::write_full) only. The writes of a guest that runs meanwhile must be tracked since before it
    /// is called, as always.
    ///
    /// # Examples
    /// ```
    /// use memory_writer::MemoryWriter;
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("full.mem");
    /// let ram = vec![0; 64 << 20]; // allocated, and never touched
    /// let mut writer = MemoryWriter::options()
    ///     .skip_untouched(true)
    ///     .skip_zeros(true)
    ///     .open(&dest, 64 << 20, 4096)?;
    /// writer.write_full(&ram)?;
    /// writer.commit()?;
    /// assert_eq!(std::fs::metadata(&dest)?.len(), 64 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn skip_untouched(mut self, skip: bool) -> Self {
        self.skip.untouched = skip;
        self
    }

    /// Reads RAM that was never touched like any other, and does not ask which that is. Not with
    /// [`skip_untouched`](Self::skip_untouched).
    ///
    /// Asking makes system calls that a seccomp filter of a VMM may kill for: `userfaultfd`, `ioctl` of
    /// it and of `/proc/self/pagemap`, `openat` of files in `/proc/self`, `lseek`, `fstatfs`, and
    /// `madvise(MADV_POPULATE_READ)`. The price of not asking is that reading makes the host allocate
    /// untouched RAM, and that a page that cannot be had is a `SIGBUS` where it is copied.
    pub fn read_untouched(mut self, read: bool) -> Self {
        self.read_untouched = read;
        self
    }

    /// The way bytes get to the file; the default works everywhere.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.write = self.write.engine(engine);
        self
    }

    /// At most how many bytes one system call writes, and so how often progress is told and cancelling heeded: 1 MiB unless told
    /// otherwise; see [`WriteOptions::chunk_size`].
    pub fn chunk_size(mut self, bytes: usize) -> Self {
        self.write = self.write.chunk_size(bytes);
        self
    }

    /// Calls `callback` on the writing thread before the first byte and after each chunk.
    pub fn progress(mut self, callback: impl FnMut(Progress) + Send + 'static) -> Self {
        self.watch.progress = Some(Box::new(callback));
        self
    }

    /// Lets `token` end a write.
    pub fn cancel(mut self, token: CancelToken) -> Self {
        self.watch.cancel = token;
        self
    }

    /// Stages a memory file of `ram_size` bytes in pages of `page_size` bytes, to replace `dest` or become it.
    ///
    /// # Errors
    /// [`SnapshotError::Ram`] for sizes that no memory file has, [`SnapshotError::Open`] where nothing can be staged,
    /// [`SnapshotError::MemoryIo`] where the file can't be that large. Nothing is left behind.
    pub fn open(
        self,
        dest: impl AsRef<Path>,
        ram_size: u64,
        page_size: u64,
    ) -> Result<MemoryWriter, SnapshotError> {
        MemoryWriter::open_with(dest.as_ref(), ram_size, page_size, self)
    }

    /// Stages a file to replace `dest` or become it, before the size of the RAM is known: that of
    /// an image that is still to come from elsewhere. [`open_on`](Self::open_on) makes it a memory
    /// file.
    ///
    /// # Errors
    /// [`SnapshotError::Open`] where nothing can be staged. Nothing is left behind.
    ///
    /// # Examples
    /// ```
    /// use memory_writer::MemoryWriter;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("full.mem");
    /// // What is known to fail at the commit fails here.
    /// let stage = MemoryWriter::options().stage(&dest)?;
    /// let ram = vec![7; 1 << 20]; // comes by the network, say
    /// let mut writer = MemoryWriter::options().open_on(stage, 1 << 20, 4096)?;
    /// writer.write_full(&ram)?;
    /// writer.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stage(&self, dest: impl AsRef<Path>) -> Result<AtomicWriter, SnapshotError> {
        Ok(self.stage.open(dest)?)
    }

    /// As [`open`](Self::open), on a file that was [staged](Self::stage) and not written. What
    /// concerns staging and the commit (durability, mode, links) is as it was given then.
    ///
    /// # Errors
    /// As [`open`](Self::open), but no [`SnapshotError::Open`].
    pub fn open_on(
        self,
        stage: AtomicWriter,
        ram_size: u64,
        page_size: u64,
    ) -> Result<MemoryWriter, SnapshotError> {
        MemoryWriter::open_on(stage, ram_size, page_size, self)
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("stage", &self.stage)
            .field("write", &self.write)
            .field("skip", &self.skip)
            .field("read_untouched", &self.read_untouched)
            .field("layout", &self.layout)
            .field("ram_start", &self.ram_start)
            .field("allow_ambiguous", &self.allow_ambiguous)
            .field("watch", &self.watch)
            .finish()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("progress", &self.progress.is_some())
            .field("cancel", &self.cancel)
            .finish()
    }
}
