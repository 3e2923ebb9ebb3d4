//! Options of snapshots.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use atomic_file::{AtomicWriter, Durability, FileVersion, Preserve, Symlinks};
use image_format::Layout;
use sparse_file::{CancelToken, Engine, Progress, WriteOptions};

use crate::progress::Reporter;
use crate::seal::Seal;

/// The pages that a full dump may skip, where they read as zeros without being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Skip {
    /// Pages of zeros, found by reading them.
    pub(crate) zeros: bool,
    /// Pages that the reader knows to be untouched.
    pub(crate) untouched: bool,
}

impl Skip {
    pub(crate) fn is_enabled(self) -> bool {
        self.zeros || self.untouched
    }
}

/// Options for a [`MemoryWriter`](crate::MemoryWriter), created by
/// [`MemoryWriter::options`](crate::MemoryWriter::options). The defaults are those of
/// [`MemoryWriter::open`](crate::MemoryWriter::open).
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use memory_writer::{CancelToken, MemoryWriter};
///
/// # let dir = tempfile::tempdir()?;
/// # let dest = dir.path().join("full.mem");
/// let (progress, seen) = std::sync::mpsc::channel();
/// let cancel = CancelToken::new(); // clone it for the thread that may cancel
/// let mut writer = MemoryWriter::options()
///     .progress(move |progress_now| match progress.send(progress_now) {
///         Ok(()) => ControlFlow::Continue(()),
///         Err(_) => ControlFlow::Break(()), // cancel without a receiver
///     })
///     .cancel(cancel.clone())
///     .open(&dest, 8 << 20, 4096)?;
/// writer.write_full(&vec![7; 8 << 20])?;
/// writer.commit()?;
/// assert_eq!(seen.try_iter().last().map(|last| last.done), Some(8 << 20));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `open`, `open_on` or `open_file`"]
pub struct MemoryWriterOptions {
    pub(crate) stage: atomic_file::AtomicWriterOptions,
    /// The durability of an open file. `stage` has that of a staged one.
    pub(crate) durability: Durability,
    pub(crate) write: WriteOptions,
    pub(crate) skip: Skip,
    pub(crate) read_untouched: bool,
    pub(crate) layout: Layout,
    pub(crate) seal: Seal,
    pub(crate) ram_start: Option<u64>,
    pub(crate) allow_ambiguous: bool,
    pub(crate) allow_replacing_parent: bool,
    pub(crate) reporter: Reporter,
}

impl MemoryWriterOptions {
    pub(crate) fn new() -> Self {
        Self {
            stage: AtomicWriter::options(),
            durability: Durability::default(),
            write: WriteOptions::new(),
            skip: Skip::default(),
            read_untouched: false,
            layout: Layout::Raw,
            seal: Seal::new(),
            ram_start: None,
            allow_ambiguous: false,
            allow_replacing_parent: false,
            reporter: Reporter::default(),
        }
    }

    /// Sets the guest-physical address of the first byte of the memory file. Every bitmap that is
    /// passed to [`write_diff`](crate::MemoryWriter::write_diff) and every epoch that is released
    /// must start there. The default is the start of the first such bitmap, and 0 for a file that
    /// is committed without one.
    pub fn ram_start(mut self, address: u64) -> Self {
        self.ram_start = Some(address);
        self
    }

    /// Sets the order of the pages in the file, and whether a footer seals it. The default is
    /// [`Layout::Raw`].
    ///
    /// A sealed or packed file has a checksum of every byte, from the copy that is written. It uses
    /// 24 bytes of memory for each run of pages, up to three times that while the list of a full
    /// dump grows, and 32 bytes for each MiB of RAM that is written, twice that during the commit.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Sets the metadata in the footer of a sealed or packed file. The default is [`Seal::new`]. A
    /// raw file has no footer: it stores no id, parent and regions, and a seal with
    /// [metadata](Seal::metadata) is refused. A raw diff replaces no image that its seal names as
    /// needed.
    pub fn seal(mut self, seal: Seal) -> Self {
        self.seal = seal;
        self
    }

    /// Sets whether to write a raw diff whose pages could not be distinguished from its holes. The
    /// default is false.
    ///
    /// `memory-image` derives the pages of a raw diff from its holes, and only where holes are
    /// known to be reported correctly: on ext4 (in a file with extents), XFS, btrfs and tmpfs of
    /// Linux, and on overlayfs over the first three, in pages of at least a block, if at least one
    /// page is clean. On other file systems (FUSE, network file systems, macOS)
    /// [`write_diff`](crate::MemoryWriter::write_diff) refuses to write a raw diff.
    /// [`Layout::Sealed`] and [`Layout::Packed`] list their pages and can be used instead.
    ///
    /// Use it in callers that keep the list of the pages themselves and read the diff with
    /// `memory_image::Chain::push_pages`. The bytes of the pages are correct in either case.
    pub fn allow_ambiguous_diff(mut self, allow: bool) -> Self {
        self.allow_ambiguous = allow;
        self
    }

    /// Sets whether a diff may replace a file that is an image which it needs: the one that the
    /// [seal](crate::Seal::parent) names as the parent, one of its
    /// [ancestors](crate::Seal::ancestors), or the one that the marks of a raw diff
    /// [build on](dirty_bitmap::DirtyBitmap::parent). The default is false, because no chain of the
    /// diff could be read. Set it if the file is a copy of that image, or a link to it.
    ///
    /// A raw image has no id, and is not recognized at the destination.
    pub fn allow_replacing_parent(mut self, allow: bool) -> Self {
        self.allow_replacing_parent = allow;
        self
    }

    /// Sets the durability that `commit` waits for. The default is [`Durability::Full`]. With less,
    /// marks are [released](crate::MemoryWriter::commit_and_release) before the file is certain to
    /// survive a power loss.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.stage = self.stage.durability(durability);
        self.durability = durability;
        self
    }

    /// Sets the permission bits of the snapshot. The default is `0o600`, because guest memory holds
    /// secrets.
    pub fn mode(mut self, mode: u32) -> Self {
        self.stage = self.stage.mode(mode);
        self
    }

    /// Sets which of the replaced file's owner, group, mode, access control list and extended
    /// attributes the snapshot gets. The default is none. See [`atomic_file::Preserve`].
    pub fn preserve(mut self, preserve: Preserve) -> Self {
        self.stage = self.stage.preserve(preserve);
        self
    }

    /// Sets whether to fail if the destination exists; see
    /// [`atomic_file::AtomicWriterOptions::no_clobber`].
    pub fn no_clobber(mut self, no_clobber: bool) -> Self {
        self.stage = self.stage.no_clobber(no_clobber);
        self
    }

    /// Replaces only this version of the destination; see
    /// [`atomic_file::AtomicWriterOptions::replace_only`].
    ///
    /// Use it for a snapshot that is made from the one it replaces: a later commit of another
    /// writer is not replaced.
    pub fn replace_only(mut self, version: FileVersion) -> Self {
        self.stage = self.stage.replace_only(version);
        self
    }

    /// Stages the file in `dir`, which must be on the destination's file system; see
    /// [`atomic_file::AtomicWriterOptions::staging_dir`].
    pub fn staging_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.stage = self.stage.staging_dir(dir);
        self
    }

    /// Sets how a destination that is a symbolic link is treated. The default is
    /// [`Symlinks::Follow`].
    pub fn symlinks(mut self, symlinks: Symlinks) -> Self {
        self.stage = self.stage.symlinks(symlinks);
        self
    }

    /// Overwrites the snapshot that the last commit replaced, if at most `max_bytes` bytes are
    /// allocated to it and no process has it open. Otherwise a new file is used, which is not an
    /// error. See [`atomic_file::AtomicWriterOptions::recycle`] for the conditions.
    ///
    /// Recycling is faster where a large snapshot is replaced repeatedly, and takes twice the
    /// space. The old bytes are never visible: `commit` or [`finish`](crate::MemoryWriter::finish)
    /// wipes what was not overwritten, and a diff is as sparse as in a new file. Uses a bit of
    /// memory per page, where pages are written.
    pub fn recycle(mut self, max_bytes: u64) -> Self {
        self.stage = self.stage.recycle(max_bytes);
        self
    }

    /// Skips pages of zeros in full dumps. They become holes, or the file system's equivalent, and
    /// read back as zeros.
    ///
    /// To find zeros, this process reads all RAM that was ever touched, at the speed of memory.
    /// Runs of less than 32 KiB of zeros are written with the data around them, because skipping
    /// them takes longer. RAM that the reader knows to be untouched is skipped without being read.
    /// Pages that are not zero are read twice from a reader that does not expose its memory.
    ///
    /// Applies to [`write_full`](crate::MemoryWriter::write_full) only. A diff records a page that
    /// became zero as written: a skipped page would count as unchanged.
    pub fn skip_zeros(mut self, skip: bool) -> Self {
        self.skip.zeros = skip;
        self
    }

    /// Skips untouched RAM in full dumps without reading it. Skipped pages read back as zeros. See
    /// [`PageReader::populated`](page_reader::PageReader::populated) for the RAM whose state is
    /// known.
    ///
    /// Applies to [`write_full`](crate::MemoryWriter::write_full) only. If the guest runs during
    /// the dump, its writes must be tracked from before the call.
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

    /// Sets whether to read untouched RAM like any other, without a query for it. Excludes
    /// [`skip_untouched`](Self::skip_untouched).
    ///
    /// The query makes system calls that the seccomp filter of a VMM may not permit: `userfaultfd`,
    /// `ioctl` of it and of `/proc/self/pagemap`, `openat` of files in `/proc/self`, `lseek`,
    /// `fstatfs`, and `madvise(MADV_POPULATE_READ)`. Without the query, reads make the host
    /// allocate untouched RAM, and a page that cannot be provided causes a `SIGBUS` when it is
    /// copied.
    pub fn read_untouched(mut self, read: bool) -> Self {
        self.read_untouched = read;
        self
    }

    /// Sets the I/O engine. The default works everywhere.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.write = self.write.engine(engine);
        self
    }

    /// Sets the maximum number of bytes that one system call writes, and thereby how often progress
    /// is reported and cancellation is checked. The default is 1 MiB; see
    /// [`WriteOptions::chunk_size`].
    pub fn chunk_size(mut self, bytes: usize) -> Self {
        self.write = self.write.chunk_size(bytes);
        self
    }

    /// Calls `callback` on the writing thread before the first byte and after each chunk. It
    /// cancels the write by returning [`ControlFlow::Break`]. The progress of each write begins at
    /// 0 and names its [pass](Progress::pass).
    pub fn progress(
        mut self,
        callback: impl FnMut(Progress) -> ControlFlow<()> + Send + 'static,
    ) -> Self {
        self.reporter.callback = Some(Arc::new(Mutex::new(callback)));
        self
    }

    /// Calls the [progress](Self::progress) function, and returns
    /// [`Break`](ControlFlow::Break) if it or the [token](Self::cancel) cancels. Use this for work
    /// that precedes the write, such as the verification of the images to merge.
    pub fn report(&self, progress: Progress) -> ControlFlow<()> {
        self.reporter.report(progress)
    }

    /// Lets `token` cancel writes.
    ///
    /// A write that is under way ends with
    /// [`SnapshotError::Cancelled`](crate::SnapshotError::Cancelled) once the chunks in flight are
    /// complete; a later write fails immediately. The writer then refuses to commit, and dropping
    /// it removes the staged file. A commit that is under way is not interrupted.
    pub fn cancel(mut self, token: CancelToken) -> Self {
        self.reporter.cancel = token;
        self
    }
}
