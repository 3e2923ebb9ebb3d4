//! Opens, writes and commits memory snapshots.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use atomic_file::{AtomicWriter, NotPreserved};
use dirty_bitmap::{Coverage, DirtyBitmap, Epoch, ReleaseError};
use image_format::{ImageId, MAX_RAM_SIZE, Placement, RAW_UNIT, packed_start};
use page_reader::{PageReader, Touched};
use sparse_file::{SpaceError, WriteOptions, ZeroError, grow, punch_hole, share_blocks};

use crate::error::{RamError, SnapshotError};
use crate::footer_builder::FooterBuilder;
use crate::layout::{Layout, Parent};
use crate::nonzero_runs::{NonzeroRuns, Skip};
use crate::options::Options;
use crate::page_record::PageRecord;
use crate::progress::{Observer, ProgressCounter};
use crate::raw_diff::RawDiff;
use crate::stale_pages::{StalePages, Zeros};
use crate::whole_pages::WholePages;
use crate::write_target::WriteTarget;

/// A memory snapshot that is staged beside its destination until [`commit`](Self::commit) replaces
/// the destination.
///
/// Dropping the writer without a commit removes the staged file and leaves the destination
/// unchanged.
///
/// `write_full` and `write_diff` may be called in any order and as often as needed; the last write
/// of a page counts. A write that fails, panics or is cancelled leaves a file that lacks pages, so
/// the writer then refuses to commit.
#[derive(Debug)]
#[must_use = "a writer that is dropped leaves no snapshot"]
pub struct MemoryWriter {
    staged: AtomicWriter,
    ram_size: u64,
    page_size: u64,
    ram_start: Option<u64>,
    write: WriteOptions,
    skip: Skip,
    read_untouched: bool,
    observer: Observer,
    state: State,
    /// Bytes that are wiped before the commit: in a recycled file, and where a full dump skipped
    /// pages that an earlier write had written.
    stale_pages: Option<StalePages>,
    pages: PageRecord,
    /// The marks of epochs whose pages were written.
    written: Coverage,
}

/// A diff of at least 1 / `SKIP_FRACTION` of the RAM does not read pages that are known to be
/// untouched.
const SKIP_FRACTION: u64 = 64;

/// Completeness of the staged file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    /// A write is under way, or has failed, panicked or been cancelled.
    Incomplete,
    Complete,
}

impl MemoryWriter {
    /// Stages a memory file of `ram_size` bytes in pages of `page_size` bytes with the default
    /// [`Options`]. The file replaces or creates `dest` when it is committed.
    ///
    /// `page_size` is a power of two: 16 KiB on Apple silicon and 4 KiB on most other hosts.
    /// `ram_size` is a multiple of it.
    ///
    /// # Errors
    /// - [`SnapshotError::Ram`] if a size is invalid.
    /// - [`SnapshotError::Open`] if the file cannot be staged.
    /// - [`SnapshotError::MemoryIo`] if the staged file cannot get its size.
    /// - [`SnapshotError::Seal`] if regions or metadata do not fit the footer.
    ///
    /// No file is left behind.
    pub fn open(
        dest: impl AsRef<Path>,
        ram_size: u64,
        page_size: u64,
    ) -> Result<Self, SnapshotError> {
        Self::options().open(dest, ram_size, page_size)
    }

    /// Returns a builder for durability, mode, progress, cancellation and other options.
    pub fn options() -> Options {
        Options::new()
    }

    pub(crate) fn open_with(
        dest: &Path,
        ram_size: u64,
        page_size: u64,
        options: Options,
    ) -> Result<Self, SnapshotError> {
        check_ram(ram_size, page_size)?;
        Self::open_on(options.stage(dest)?, ram_size, page_size, options)
    }

    pub(crate) fn open_on(
        staged: AtomicWriter,
        ram_size: u64,
        page_size: u64,
        options: Options,
    ) -> Result<Self, SnapshotError> {
        check_ram(ram_size, page_size)?;
        let Options {
            write,
            skip,
            read_untouched,
            layout,
            ram_start,
            observer,
            allow_ambiguous,
            ..
        } = options;
        let (placement, seal) = match layout {
            Layout::Raw => (Placement::InPlace, None),
            Layout::Sealed(seal) => (Placement::InPlace, Some(seal)),
            Layout::Packed(seal) => (Placement::Packed, Some(seal)),
        };
        let footer = seal.map(|seal| {
            let ram_start = ram_start.unwrap_or(0);
            FooterBuilder::new(seal, placement, ram_size, page_size, ram_start)
        });
        let dest = || staged.dest_path().to_owned();
        let footer = footer
            .transpose()
            .map_err(|error| SnapshotError::from_seal(dest(), error))?;
        let pages = match footer {
            Some(footer) => PageRecord::Footer(footer),
            None if allow_ambiguous => PageRecord::Caller,
            None => PageRecord::Empty,
        };
        if placement == Placement::InPlace {
            resize(staged.file(), ram_size)
                .map_err(|error| SnapshotError::from_grow(dest(), ram_size, error))?;
        }
        let stale_pages = match (staged.recycled(), placement) {
            (false, _) => None,
            (true, Placement::InPlace) => Some(StalePages::all(ram_size, page_size)),
            (true, Placement::Packed) => {
                // Packed pages leave one gap: between the header and the first page.
                wipe_header(staged.file(), packed_start(page_size), &write)
                    .map_err(|error| SnapshotError::from_wipe(dest(), error))?;
                None
            }
        };
        Ok(Self {
            staged,
            ram_size,
            page_size,
            ram_start,
            write,
            skip,
            read_untouched,
            observer,
            state: State::Empty,
            stale_pages,
            pages,
            written: Coverage::new(),
        })
    }

    /// Returns the size of the memory file in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// Returns the size of a page of the memory file in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Returns the path that the commit replaces or creates.
    #[must_use]
    pub fn dest_path(&self) -> &Path {
        self.staged.dest_path()
    }

    /// Returns the path of the staged file.
    #[must_use]
    pub fn temp_path(&self) -> &Path {
        self.staged.temp_path()
    }

    /// Returns whether the staged file is an older snapshot that [`Options::recycle`] reuses.
    #[must_use]
    pub fn recycled(&self) -> bool {
        self.staged.recycled()
    }

    /// Returns the id of the snapshot, or `None` for a raw one. A diff on top of the snapshot names
    /// the id as its parent.
    #[must_use]
    pub fn image_id(&self) -> Option<ImageId> {
        self.pages.footer().map(FooterBuilder::id)
    }

    /// Stores `bytes` with the snapshot and replaces [`Seal::metadata`](crate::Seal::metadata).
    /// Suits the state of the vCPUs, which is known once they are paused.
    ///
    /// # Errors
    /// - [`SnapshotError::NotSealed`]: a raw file cannot hold metadata.
    /// - [`SnapshotError::Seal`] for more than 16 MiB.
    ///
    /// The writer is unchanged after either error.
    pub fn set_metadata(&mut self, bytes: impl Into<Vec<u8>>) -> Result<(), SnapshotError> {
        let dest = || self.staged.dest_path().to_owned();
        let PageRecord::Footer(footer) = &mut self.pages else {
            return Err(SnapshotError::NotSealed { dest: dest() });
        };
        let set = footer.set_metadata(bytes.into());
        set.map_err(|source| SnapshotError::Seal {
            dest: dest(),
            source,
        })
    }

    /// Writes all of the RAM: every byte of `[0, ram_size)`. Pages of zeros are written too, unless
    /// [`Options::skip_zeros`] or [`Options::skip_untouched`] skips them.
    ///
    /// RAM that the reader [knows](page_reader::PageReader::populated) to be untouched is not read,
    /// because a read would make the host allocate it. Zeros are written in its place.
    ///
    /// # Errors
    /// - [`SnapshotError::FullWithParent`]: nothing was written.
    /// - [`SnapshotError::MemoryIo`] or [`SnapshotError::Cancelled`]: the writer can no longer be
    ///   committed.
    pub fn write_full<R: PageReader + ?Sized>(&mut self, reader: &R) -> Result<(), SnapshotError> {
        let parent = self.pages.footer().map(FooterBuilder::parent);
        if matches!(parent, Some(Parent::Image(_))) {
            return Err(SnapshotError::FullWithParent {
                dest: self.staged.dest_path().to_owned(),
            });
        }
        let written_before = self.state != State::Empty;
        self.begin()?;
        let began = Coverage::begin_full();
        self.pages.begin_full();
        if self.skip.is_enabled() && written_before && self.in_place() {
            // A full dump that skips zeros must not leave bytes of an earlier write.
            self.stale_pages = Some(StalePages::all(self.ram_size, self.page_size));
        }
        let (ram_size, page_size) = (self.ram_size, self.page_size);
        let skip = self.skip;
        let reader = &match self.read_untouched && !skip.untouched {
            true => Touched::unknown(reader, ram_size).without_faulting_in(),
            false => Touched::new(reader, ram_size),
        };
        let (target, observer) = self.target();
        let counter = ProgressCounter::new(observer, page_size, ram_size);
        if skip.is_enabled() {
            let needed = NonzeroRuns::new(reader, skip, ram_size, page_size, &counter);
            target.write(reader, needed, ram_size, None, &counter)?;
        } else {
            target.write(
                reader,
                std::iter::once(0..ram_size),
                ram_size,
                Some(1),
                &counter,
            )?;
        }
        self.written.add_full(began);
        self.state = State::Complete;
        Ok(())
    }

    /// Copies a raw image into the snapshot by sharing its blocks, where [the file system
    /// can](sparse_file::share_blocks). This takes no time, and no space until a page is written.
    ///
    /// Returns false and writes nothing where the file system cannot share blocks, and for a layout
    /// that is not raw. [Write](Self::write_full) the bytes of the image in that case.
    ///
    /// # Errors
    /// [`SnapshotError::MemoryIo`]: the writer can no longer be committed.
    pub fn share_full(&mut self, image: &File) -> Result<bool, SnapshotError> {
        if self.pages.footer().is_some() {
            return Ok(false);
        }
        let before = self.state;
        self.begin()?;
        match share_blocks(image, self.staged.file(), self.ram_size) {
            Ok(()) => {}
            Err(SpaceError::Unsupported { .. }) => {
                self.state = before;
                return Ok(false);
            }
            Err(error) => {
                let dest = self.staged.dest_path().to_owned();
                return Err(SnapshotError::from_share(dest, error));
            }
        }
        self.stale_pages = None;
        self.pages.begin_full();
        // The image has replaced all pages of the RAM that were written.
        self.written.clear();
        self.state = State::Complete;
        Ok(true)
    }

    /// Writes the pages that `dirty` marks. Returns the number of pages of the memory file that
    /// were written.
    ///
    /// The bitmap may be of any kind and have any page size: its marks are widened to whole pages
    /// of the file. It is not changed: pass the bitmap of an [`Epoch`], and [commit and
    /// release](Self::commit_and_release) the epoch. A diff without a dirty page is a file of one
    /// hole and can be committed.
    ///
    /// Marked pages that are [known](page_reader::PageReader::populated) to be untouched are
    /// written as zeros without being read if at least 1/64 of the RAM is marked. Pass a
    /// [`Touched`] to get this in every case, for a guest that returns pages to the host (a
    /// balloon) after it wrote them.
    ///
    /// Only the holes of the file record which pages a raw diff holds. Where holes are not
    /// reliable, the diff is refused before anything is written: see
    /// [`Options::allow_ambiguous_diff`]. Before the commit, the holes of the file are compared
    /// with what was written. After [`write_full`](Self::write_full) the file is a full image that
    /// holds every page, and is not checked.
    ///
    /// # Errors
    /// Nothing was written and the writer is unchanged after:
    ///
    /// - [`SnapshotError::BitmapSize`] or [`SnapshotError::BitmapStart`] if the bitmap covers other
    ///   RAM.
    /// - [`SnapshotError::AmbiguousDiff`] if a raw diff could not be read back.
    /// - [`SnapshotError::DiffWithoutParent`] for a sealed diff that no chain accepts.
    /// - [`SnapshotError::Seal`] for more runs than a footer can list.
    ///
    /// The writer can no longer be committed after [`SnapshotError::MemoryIo`] or
    /// [`SnapshotError::Cancelled`].
    pub fn write_diff<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        dirty: &DirtyBitmap<impl Sized>,
    ) -> Result<u64, SnapshotError> {
        self.check_bitmap(dirty)?;
        let ram = dirty.ram_start();
        let pages = self.write_pages(reader, || dirty.runs(), Some(ram))?;
        self.written.add_diff(dirty);
        Ok(pages)
    }

    /// Writes the pages that overlap the given runs of bytes. Returns the number of pages of the
    /// memory file that were written. Like [`write_diff`](Self::write_diff), for callers that know
    /// runs and need no bitmap of all the RAM.
    ///
    /// `runs` is called more than once and returns the same runs each time: ranges of bytes of the
    /// RAM that ascend and do not overlap. Does not count as a write of any mark of an epoch.
    ///
    /// # Errors
    /// [`SnapshotError::Run`] for a run that is empty, ends past the RAM or begins before the
    /// previous run ended: nothing was written and the writer is unchanged. Otherwise as
    /// `write_diff`.
    ///
    /// # Examples
    /// ```
    /// use memory_writer::{Layout, MemoryWriter, Seal};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("diff.mem");
    /// let ram = vec![7; 1 << 20];
    /// let mut writer = MemoryWriter::options()
    ///     .layout(Layout::Packed(Seal::new().on_raw_image()))
    ///     .open(&dest, 1 << 20, 4096)?;
    /// writer.write_zeros(|| [65536..131072].into_iter())?;
    /// assert_eq!(writer.write_runs(&ram, || [0..4096, 8192..8193].into_iter())?, 2);
    /// writer.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_runs<R: PageReader + ?Sized, I: Iterator<Item = Range<u64>>>(
        &mut self,
        reader: &R,
        runs: impl Fn() -> I,
    ) -> Result<u64, SnapshotError> {
        self.check_runs(runs(), 1)?;
        self.write_pages(reader, runs, None)
    }

    /// Records pages as zeros without reading them. The pages take no space in the footer of a
    /// sealed or packed diff, and become holes in a raw file that holds all of the RAM. In a raw
    /// diff, whose holes are clean pages, zeros are written.
    ///
    /// `runs` is called more than once and returns the same runs each time: ranges of bytes of the
    /// RAM that ascend, do not overlap and consist of whole pages of the memory file. Uses 16 bytes
    /// of memory a run.
    ///
    /// # Errors
    /// [`SnapshotError::Run`] for a run that is empty, is not of whole pages, ends past the RAM or
    /// begins before the previous run ended. Otherwise as [`write_diff`](Self::write_diff).
    pub fn write_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: impl Fn() -> I,
    ) -> Result<(), SnapshotError> {
        let count = self.check_runs(runs(), self.page_size)?;
        match &self.pages {
            PageRecord::Footer(_) => self.list_zeros(&runs, count),
            PageRecord::All => self.punch_zeros(&runs),
            PageRecord::Empty | PageRecord::Holes(_) | PageRecord::Caller => {
                self.write_pages(&Zeros, runs, None).map(drop)
            }
        }
    }

    /// Lists runs of zeros in the footer. Overwrites pages that are already in the file with zeros.
    fn list_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: &impl Fn() -> I,
        count: u64,
    ) -> Result<(), SnapshotError> {
        self.check_diff(count)?;
        let placed = self.pages.footer().map_or_else(Vec::new, |footer| {
            let placed = runs().flat_map(|run| footer.placed(run));
            placed.collect()
        });
        if placed.is_empty() {
            self.begin()?;
        } else {
            self.write_pages(&Zeros, || placed.iter().cloned(), None)?;
        }
        if let PageRecord::Footer(footer) = &mut self.pages {
            footer.add_zeros(runs());
        }
        self.state = State::Complete;
        Ok(())
    }

    /// Punches holes in a raw file that holds all of the RAM, or writes zeros where the file system
    /// has no holes.
    fn punch_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: &impl Fn() -> I,
    ) -> Result<(), SnapshotError> {
        self.begin()?;
        for run in runs() {
            match punch_hole(self.staged.file(), run.clone()) {
                Ok(()) => {}
                Err(SpaceError::Unsupported { .. }) => {
                    self.state = State::Complete;
                    return self.write_pages(&Zeros, runs, None).map(drop);
                }
                Err(error) => {
                    let dest = self.staged.dest_path().to_owned();
                    return Err(SnapshotError::from_punch(dest, run.start, error));
                }
            }
        }
        self.state = State::Complete;
        Ok(())
    }

    /// Writes the pages of the memory file that overlap `runs`. `ram` is the guest-physical start
    /// address of the RAM, if a bitmap provides it.
    fn write_pages<R: PageReader + ?Sized, I: Iterator<Item = Range<u64>>>(
        &mut self,
        reader: &R,
        runs: impl Fn() -> I,
        ram: Option<u64>,
    ) -> Result<u64, SnapshotError> {
        let (ram_size, page_size) = (self.ram_size, self.page_size);
        let pages = || WholePages::new(runs(), page_size);
        let (mut count, mut total) = (0, 0);
        pages().for_each(|run| {
            count += 1;
            total += run.end - run.start;
        });
        self.check_diff(count)?;
        self.check_raw_diff(pages())?;
        if let Some(ram) = ram {
            self.set_ram_start(ram);
        }
        self.begin()?;
        let read_untouched = self.read_untouched;
        let (target, observer) = self.target();
        let counter = ProgressCounter::new(observer, page_size, total);
        // Marked pages were written, so they are populated. Many marks may mean that all of the RAM
        // is marked, touched or not: then the query takes less time than the writes it saves.
        let reader = &if read_untouched {
            Touched::unknown(reader, ram_size).without_faulting_in()
        } else if total >= ram_size / SKIP_FRACTION {
            Touched::new(reader, ram_size)
        } else {
            Touched::unknown(reader, ram_size)
        };
        let written = target.write(reader, pages(), total, Some(count), &counter)?;
        self.state = State::Complete;
        Ok(written / page_size)
    }

    /// Checks that runs ascend, do not overlap, are inside the RAM, and begin and end at multiples
    /// of `unit`. Returns the number of runs.
    fn check_runs(
        &self,
        runs: impl Iterator<Item = Range<u64>>,
        unit: u64,
    ) -> Result<u64, SnapshotError> {
        let (mut count, mut last) = (0, 0);
        for Range { start, end } in runs {
            let whole = start.is_multiple_of(unit) && end.is_multiple_of(unit);
            if !whole || start < last || start >= end || end > self.ram_size {
                return Err(SnapshotError::Run {
                    start,
                    end,
                    page_size: self.page_size,
                    ram_size: self.ram_size,
                });
            }
            (count, last) = (count + 1, end);
        }
        Ok(count)
    }

    /// Checks that a bitmap covers this RAM, as far as the RAM's range is known.
    fn check_bitmap<K>(&self, bitmap: &DirtyBitmap<K>) -> Result<(), SnapshotError> {
        if bitmap.ram_size() != self.ram_size {
            return Err(SnapshotError::BitmapSize {
                bitmap: bitmap.ram_size(),
                file: self.ram_size,
            });
        }
        match self.ram_start {
            Some(ram) if ram != bitmap.ram_start() => Err(SnapshotError::BitmapStart {
                bitmap: bitmap.ram_start(),
                ram,
            }),
            _ => Ok(()),
        }
    }

    /// Sets the start of the RAM to that of a bitmap that was [checked](Self::check_bitmap).
    fn set_ram_start(&mut self, ram_start: u64) {
        self.ram_start = Some(ram_start);
        if let PageRecord::Footer(footer) = &mut self.pages {
            footer.set_ram_start(ram_start);
        }
    }

    /// Checks that a footer can describe a diff of `runs` runs, and that a chain accepts the diff.
    fn check_diff(&self, runs: u64) -> Result<(), SnapshotError> {
        let PageRecord::Footer(footer) = &self.pages else {
            return Ok(());
        };
        let dest = || self.staged.dest_path().to_owned();
        if footer.parent() == Parent::Unnamed && !footer.is_full() {
            return Err(SnapshotError::DiffWithoutParent { dest: dest() });
        }
        let room = footer.check_room(runs);
        room.map_err(|source| SnapshotError::Seal {
            dest: dest(),
            source,
        })
    }

    /// Checks that a raw diff with `runs` of pages can be read back.
    fn check_raw_diff(
        &mut self,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<(), SnapshotError> {
        if self.state == State::Incomplete {
            return Ok(());
        }
        let check = || {
            if matches!(self.pages, PageRecord::Empty) {
                let begun = RawDiff::begin(self.staged.file(), self.ram_size, self.page_size)?;
                self.pages = PageRecord::Holes(begun);
            }
            match &self.pages {
                PageRecord::Holes(diff) => diff.check_hole_is_left(runs),
                PageRecord::Empty
                | PageRecord::All
                | PageRecord::Caller
                | PageRecord::Footer(_) => Ok(()),
            }
        };
        let dest = || self.staged.dest_path().to_owned();
        check().map_err(|source| SnapshotError::AmbiguousDiff {
            dest: dest(),
            source,
        })
    }

    /// Returns the attributes of the replaced file that the snapshot will not get; see
    /// [`atomic_file::AtomicWriter::not_preserved`].
    #[must_use]
    pub fn not_preserved(&self) -> &[NotPreserved] {
        self.staged.not_preserved()
    }

    /// Returns the target of a write and the observer of its progress.
    fn target(&mut self) -> (WriteTarget<'_>, &mut Observer) {
        let target = WriteTarget {
            staged: &self.staged,
            options: &self.write,
            stale_pages: &mut self.stale_pages,
            pages: &mut self.pages,
        };
        (target, &mut self.observer)
    }

    /// Marks the writer as incomplete until the write that begins has succeeded.
    fn begin(&mut self) -> Result<(), SnapshotError> {
        if self.state == State::Incomplete {
            return Err(self.incomplete());
        }
        self.state = State::Incomplete;
        Ok(())
    }

    /// Syncs the file, renames it to its destination, and syncs the directory. Once this has
    /// returned, the snapshot survives a power loss (see [`Options::durability`]).
    ///
    /// # Errors
    /// - [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`],
    ///   [`SnapshotError::MemoryIo`] (a recycled file could not be wiped),
    ///   [`SnapshotError::AmbiguousDiff`] and [`SnapshotError::Seal`]: the destination is
    ///   unchanged.
    /// - [`SnapshotError::Commit`] states whether the old or the new file is at the destination.
    ///
    /// No file is left behind except those that the error names.
    pub fn commit(self) -> Result<(), SnapshotError> {
        Ok(self.finish()?.commit()?)
    }

    /// Commits as [`commit`](Self::commit) does, and then releases the epoch whose pages were
    /// written. On any error, the marks are restored to the bitmap.
    ///
    /// First [checks](Self::check_epoch) that every page of the epoch was written. Commits nothing
    /// if the epoch was [reclaimed](DirtyBitmap::reclaim_epoch): a later save may have committed
    /// its own file. The epoch cannot be reclaimed while the commit runs.
    ///
    /// The marks are released when the commit returns, at any
    /// [durability](crate::Options::durability). With [`Durability::Full`](crate::Durability::Full)
    /// the file then survives a power loss. With less durability a power loss may remove it: later
    /// snapshots that are durable then lack its pages, and a chain that contains an empty or torn
    /// raw file restores wrong memory without an error.
    ///
    /// # Errors
    /// - [`SnapshotError::BitmapSize`], [`SnapshotError::BitmapStart`],
    ///   [`SnapshotError::EpochNotWritten`] and [`SnapshotError::EpochReclaimed`]: nothing was
    ///   committed.
    /// - Otherwise as [`commit`](Self::commit).
    pub fn commit_and_release<K, B: Deref<Target = DirtyBitmap<K>>>(
        mut self,
        epoch: Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        self.check_epoch(&epoch)?;
        let dest = self.staged.dest_path().to_owned();
        epoch
            .release_after(|| self.commit())
            .map_err(|error| match error {
                ReleaseError::Commit(error) => error,
                ReleaseError::Reclaimed(source) => SnapshotError::EpochReclaimed { dest, source },
            })
    }

    /// Checks that every page whose mark `epoch` holds was written after the mark was taken.
    ///
    /// [`commit_and_release`](Self::commit_and_release) includes this check. Call it where the file
    /// is committed as part of a group: before [`finish`](Self::finish), which
    /// [`Epoch::release_after`] may run together with the commit of the group.
    ///
    /// If neither [`Options::ram_start`] nor a diff has set the start of the RAM, the check takes
    /// it from the epoch's bitmap, so that a full image and the diffs on top of it name the same
    /// addresses. `finish` writes the addresses, so the check must come first.
    ///
    /// Only writes of this writer count: a [full write](Self::write_full) that began after the
    /// marks were taken, and [diffs](Self::write_diff) of [`Epoch::bitmap`] or of a bitmap that
    /// [`Epoch::extend`] returned. A diff of the bitmap that the guest marks does not count.
    /// [`share_full`](Self::share_full) does not count and undoes the writes before it. A
    /// [clean](DirtyBitmap::is_clean) part needs no write.
    ///
    /// The check compares the size and the known start of the RAM. It cannot determine whether a
    /// full write read the RAM that the epoch's bitmap covers.
    ///
    /// # Errors
    /// [`SnapshotError::EpochNotWritten`], [`SnapshotError::BitmapSize`] and
    /// [`SnapshotError::BitmapStart`].
    pub fn check_epoch<K, B: Deref<Target = DirtyBitmap<K>>>(
        &mut self,
        epoch: &Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        self.check_bitmap(epoch.bitmap())?;
        if !self.written.covers(epoch) {
            return Err(SnapshotError::EpochNotWritten {
                dest: self.staged.dest_path().to_owned(),
            });
        }
        self.set_ram_start(epoch.bitmap().ram_start());
        Ok(())
    }

    /// Completes the staged file and returns it, for a commit as part of an
    /// [`atomic_file::AtomicGroup`]: for example together with the state of the vCPUs.
    ///
    /// # Errors
    /// [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`],
    /// [`SnapshotError::MemoryIo`] (a recycled file could not be wiped),
    /// [`SnapshotError::AmbiguousDiff`] and [`SnapshotError::Seal`]: the destination is unchanged
    /// and no file is left behind.
    pub fn finish(self) -> Result<AtomicWriter, SnapshotError> {
        let dest = || self.staged.dest_path().to_owned();
        match self.state {
            State::Complete => {}
            State::Incomplete => return Err(self.incomplete()),
            State::Empty => return Err(SnapshotError::NothingWritten { dest: dest() }),
        }
        let file = self.staged.file();
        if let Some(stale_pages) = &self.stale_pages {
            stale_pages
                .wipe(file, &self.write)
                .map_err(|error| SnapshotError::from_wipe(dest(), error))?;
        }
        match self.pages {
            PageRecord::Holes(diff) => {
                diff.check_written(file)
                    .map_err(|source| SnapshotError::AmbiguousDiff {
                        dest: dest(),
                        source,
                    })?;
            }
            PageRecord::Footer(footer) => {
                footer
                    .seal(file)
                    .map_err(|error| SnapshotError::from_seal(dest(), error))?;
            }
            PageRecord::Empty | PageRecord::All | PageRecord::Caller => {}
        }
        Ok(self.staged)
    }

    fn in_place(&self) -> bool {
        self.pages
            .footer()
            .is_none_or(|footer| footer.map.placement() == Placement::InPlace)
    }

    fn incomplete(&self) -> SnapshotError {
        SnapshotError::Incomplete {
            dest: self.staged.dest_path().to_owned(),
        }
    }
}

/// Sets the length of a staged file: grows a new file, and shrinks a recycled file that is longer.
fn resize(file: &File, len: u64) -> Result<(), SpaceError> {
    let shrink = || {
        if file.metadata()?.len() > len {
            file.set_len(len)?;
        }
        Ok(())
    };
    shrink().map_err(|source| SpaceError::Io {
        operation: "shrink the file",
        range: 0..len,
        source,
    })?;
    grow(file, len)
}

/// Overwrites a recycled file with zeros between the header of a packed image and its first page.
fn wipe_header(file: &File, data_start: u64, options: &WriteOptions) -> Result<(), ZeroError> {
    if data_start > packed_start(0) {
        let mut rest = StalePages::all(data_start, packed_start(0));
        rest.remove(&(0..packed_start(0)));
        rest.wipe(file, options)?;
    }
    Ok(())
}

fn check_ram(ram_size: u64, page_size: u64) -> Result<(), RamError> {
    if ram_size == 0 {
        return Err(RamError::NoRam);
    }
    if ram_size > MAX_RAM_SIZE {
        return Err(RamError::TooLarge { ram_size });
    }
    if !page_size.is_power_of_two() {
        return Err(RamError::PageSizeNotPowerOfTwo { page_size });
    }
    if page_size < RAW_UNIT {
        return Err(RamError::PageTooSmall { page_size });
    }
    if page_size > ram_size {
        return Err(RamError::PageLargerThanRam {
            page_size,
            ram_size,
        });
    }
    if !ram_size.is_multiple_of(page_size) {
        return Err(RamError::NotWholePages {
            ram_size,
            page_size,
        });
    }
    Ok(())
}
