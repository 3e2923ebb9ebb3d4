//! Open, write, commit.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use atomic_file::{AtomicWriter, NotPreserved};
use dirty_bitmap::{Coverage, DirtyBitmap, Epoch, ReleaseError};
use image_format::{ImageId, MAX_RAM_SIZE, Placement, RAW_UNIT, packed_start};
use page_reader::{PageReader, Touched};
use sparse_file::{SpaceError, WriteOptions, grow, punch_hole, share_blocks};

use crate::error::{RamError, SnapshotError};
use crate::held::Held;
use crate::layout::{Layout, Parent};
use crate::meter::Meter;
use crate::needed::{Needed, Skip};
use crate::options::{Options, Watch};
use crate::pages::WholePages;
use crate::raw_diff::RawDiff;
use crate::sealing::Sealing;
use crate::sink::Sink;
use crate::unwritten::{Unwritten, WipeError, Zeros};

/// A memory snapshot under way: staged beside its destination until [`commit`](Self::commit) puts it there.
///
/// Dropped without a commit, it leaves the destination as it was and nothing behind.
///
/// `write_full` and `write_diff` may be called in any order and as often as needed; the last write of a page counts. A write that
/// fails, panics or is cancelled leaves a file that lacks pages, so the writer then refuses to commit.
#[derive(Debug)]
#[must_use = "a writer that is dropped leaves no snapshot"]
pub struct MemoryWriter {
    stage: AtomicWriter,
    ram_size: u64,
    page_size: u64,
    ram_start: Option<u64>,
    write: WriteOptions,
    skip: Skip,
    read_untouched: bool,
    watch: Watch,
    state: State,
    /// What is to be wiped before the file is committed: in a recycled stage, and where a full dump left out what had been written.
    unwritten: Option<Unwritten>,
    held: Held,
    /// Which marks of epochs were written.
    written: Coverage,
}

/// A diff of at least this part of the RAM does not read what is known to be untouched.
const ASK_FROM: u64 = 64;

/// What the staged file is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    /// A write has begun and not succeeded: it is under way, or it failed, panicked or was cancelled.
    Incomplete,
    Whole,
}

impl MemoryWriter {
    /// Stages a memory file of `ram_size` bytes in pages of `page_size` bytes, to replace `dest` or become it, with the
    /// default [`Options`].
    ///
    /// `page_size` is a power of two, 16 KiB on Apple Silicon and 4 KiB on most other hosts; `ram_size` is a multiple of it.
    ///
    /// # Errors
    /// [`SnapshotError::Ram`] for sizes that no memory file has, [`SnapshotError::Open`] where nothing can be staged,
    /// [`SnapshotError::MemoryIo`] where the file can't be that large, [`SnapshotError::Seal`] where regions or metadata don't fit the
    /// footer. Nothing is left behind.
    pub fn open(
        dest: impl AsRef<Path>,
        ram_size: u64,
        page_size: u64,
    ) -> Result<Self, SnapshotError> {
        Self::options().open(dest, ram_size, page_size)
    }

    /// Durability, mode, progress, cancellation and whatever else is not the default.
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
        stage: AtomicWriter,
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
            watch,
            allow_ambiguous,
            ..
        } = options;
        let (placement, seal) = match layout {
            Layout::Raw => (Placement::InPlace, None),
            Layout::Sealed(seal) => (Placement::InPlace, Some(seal)),
            Layout::Packed(seal) => (Placement::Packed, Some(seal)),
        };
        let sealing = seal.map(|seal| {
            let ram_start = ram_start.unwrap_or(0);
            Sealing::new(seal, placement, ram_size, page_size, ram_start)
        });
        let dest = || stage.dest_path().to_owned();
        let sealing = sealing
            .transpose()
            .map_err(|error| SnapshotError::from_seal(dest(), error))?;
        let held = match sealing {
            Some(sealing) => Held::ByFooter(sealing),
            None if allow_ambiguous => Held::ByCaller,
            None => Held::Nothing,
        };
        if placement == Placement::InPlace {
            resize(stage.file(), ram_size)
                .map_err(|error| SnapshotError::from_grow(dest(), ram_size, error))?;
        }
        let unwritten = match (stage.recycled(), placement) {
            (false, _) => None,
            (true, Placement::InPlace) => Some(Unwritten::all(ram_size, page_size)),
            (true, Placement::Packed) => {
                // Packed pages leave no gaps, but the one between the header and the first.
                wipe_header(stage.file(), packed_start(page_size), &write)
                    .map_err(|error| SnapshotError::from_wipe(dest(), error))?;
                None
            }
        };
        Ok(Self {
            stage,
            ram_size,
            page_size,
            ram_start,
            write,
            skip,
            read_untouched,
            watch,
            state: State::Empty,
            unwritten,
            held,
            written: Coverage::new(),
        })
    }

    /// The size of the memory file in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// The page of the memory file in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Where the snapshot will be.
    #[must_use]
    pub fn dest_path(&self) -> &Path {
        self.stage.dest_path()
    }

    /// Where it is staged.
    #[must_use]
    pub fn temp_path(&self) -> &Path {
        self.stage.temp_path()
    }

    /// Whether the staged file is an older snapshot's, on request of [`Options::recycle`].
    #[must_use]
    pub fn recycled(&self) -> bool {
        self.stage.recycled()
    }

    /// The id of the snapshot, which a diff on top of it names as its parent; `None` for a raw one.
    #[must_use]
    pub fn image_id(&self) -> Option<ImageId> {
        self.held.sealing().map(Sealing::id)
    }

    /// Keeps `bytes` with the snapshot in place of [`Seal::metadata`](crate::Seal::metadata): the vCPUs' state, as it is once they are paused.
    ///
    /// # Errors
    /// [`SnapshotError::NotSealed`]: a raw file has no place for them. [`SnapshotError::Seal`] for more than 16 MiB. Either way the writer stays as it
    /// was.
    pub fn set_metadata(&mut self, bytes: impl Into<Vec<u8>>) -> Result<(), SnapshotError> {
        let dest = || self.stage.dest_path().to_owned();
        let Held::ByFooter(sealing) = &mut self.held else {
            return Err(SnapshotError::NotSealed { dest: dest() });
        };
        let set = sealing.set_metadata(bytes.into());
        set.map_err(|source| SnapshotError::Seal {
            dest: dest(),
            source,
        })
    }

    /// Writes all of the RAM, every byte of `[0, ram_size)`, zeros too unless [`Options::skip_zeros`] or
    /// [`Options::skip_untouched`] leave them out.
    ///
    /// RAM that the reader [knows](page_reader::PageReader::populated) to be untouched is not read:
    /// reading would make the host allocate it. Zeros are written in its place.
    ///
    /// # Errors
    /// [`SnapshotError::FullWithParent`]: nothing was written. [`SnapshotError::MemoryIo`] or [`SnapshotError::Cancelled`]; the writer
    /// can't be committed then.
    pub fn write_full<R: PageReader + ?Sized>(&mut self, reader: &R) -> Result<(), SnapshotError> {
        let parent = self.held.sealing().map(Sealing::parent);
        if matches!(parent, Some(Parent::Image(_))) {
            return Err(SnapshotError::FullWithParent {
                dest: self.stage.dest_path().to_owned(),
            });
        }
        let written_before = self.state != State::Empty;
        self.begin()?;
        let began = Coverage::begin_full();
        self.held.begin_full();
        if self.skip.anything() && written_before && self.in_place() {
            // Where this leaves out zeros, nothing may be left of that.
            self.unwritten = Some(Unwritten::all(self.ram_size, self.page_size));
        }
        let (ram_size, page_size) = (self.ram_size, self.page_size);
        let skip = self.skip;
        let reader = &match self.read_untouched && !skip.untouched {
            true => Touched::unknown(reader, ram_size).without_faulting_in(),
            false => Touched::new(reader, ram_size),
        };
        let (sink, watch) = self.sink();
        let meter = Meter::new(watch, page_size, ram_size);
        if skip.anything() {
            let needed = Needed::new(reader, skip, ram_size, page_size, &meter);
            sink.write(reader, needed, ram_size, None, &meter)?;
        } else {
            sink.write(
                reader,
                std::iter::once(0..ram_size),
                ram_size,
                Some(1),
                &meter,
            )?;
        }
        self.written.add_full(began);
        self.state = State::Whole;
        Ok(())
    }

    /// Makes the snapshot all of a raw image, whose blocks it shares until a page is written: no time and no space, where
    /// [the file system can](sparse_file::share_blocks). Returns false, and has written nothing, where it can't, and for a layout that is not raw: then
    /// [write](Self::write_full) the image's bytes.
    ///
    /// # Errors
    /// [`SnapshotError::MemoryIo`]; the writer can't be committed then.
    pub fn share_full(&mut self, image: &File) -> Result<bool, SnapshotError> {
        if self.held.sealing().is_some() {
            return Ok(false);
        }
        let before = self.state;
        self.begin()?;
        match share_blocks(image, self.stage.file(), self.ram_size) {
            Ok(()) => {}
            Err(SpaceError::Unsupported { .. }) => {
                self.state = before;
                return Ok(false);
            }
            Err(error) => {
                let dest = self.stage.dest_path().to_owned();
                return Err(SnapshotError::from_share(dest, error));
            }
        }
        self.unwritten = None;
        self.held.begin_full();
        // The image's pages have replaced what was written of the RAM.
        self.written.clear();
        self.state = State::Whole;
        Ok(true)
    }

    /// Writes the pages that `dirty` has marks in, and returns how many pages of the memory file that were.
    ///
    /// The bitmap may be of any kind and have any page size: what it marks is widened to whole pages of the file. It stays as it is:
    /// give an [`Epoch`]'s bitmap, and [commit and release](Self::commit_and_release) it.
    /// A diff without any dirty page is a file of one hole, and can be committed. Pages that are marked and
    /// [known](page_reader::PageReader::populated) to be untouched are written as zeros without reading
    /// them, if at least 1/64 of the RAM is marked. Give a [`Touched`] to have it so in any case, where the
    /// guest gives pages back (a balloon) after it wrote them.
    ///
    /// Which pages a raw diff holds, only the holes of its file tell. Where they cannot, it is refused before anything is written: see
    /// [`Options::allow_ambiguous_diff`]. Before the commit, the holes of its file are compared with what was written. After [`write_full`](Self::write_full) the file is a full image and holds every page:
    /// nothing is checked then.
    ///
    /// # Errors
    /// [`SnapshotError::BitmapSize`] or [`SnapshotError::BitmapStart`] where the bitmap is of another RAM,
    /// [`SnapshotError::AmbiguousDiff`] where a raw diff could not be read back,
    /// [`SnapshotError::DiffWithoutParent`] for a sealed diff that no chain would take, [`SnapshotError::Seal`] for more runs than a footer has room
    /// for: nothing was written, and the writer stays as it was. [`SnapshotError::MemoryIo`] or [`SnapshotError::Cancelled`]; the writer can't be committed then.
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

    /// Writes the pages that runs of bytes reach into, and returns how many pages of the memory
    /// file that were: as [`write_diff`](Self::write_diff), for callers that know runs and need no
    /// bitmap of all the RAM.
    ///
    /// `runs` is called more than once, and returns the same runs each time: ranges of bytes of the
    /// RAM, ascending and apart. No mark of an epoch counts as written by this.
    ///
    /// # Errors
    /// [`SnapshotError::Run`] for a run that is empty, ends past the RAM or begins before the last
    /// one ended: nothing was written, and the writer stays as it was. Otherwise as `write_diff`.
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

    /// Makes pages zeros, where that is known without reading them, and takes no room for them
    /// where the layout can say so: the footer of a sealed or packed diff does, and a raw file that
    /// holds all of the RAM gets holes. In a raw diff, whose holes are clean pages, zeros are
    /// written.
    ///
    /// `runs` is called more than once, and returns the same runs each time: ranges of bytes of the
    /// RAM, ascending and apart, of whole pages of the memory file. Memory: 16 bytes a run.
    ///
    /// # Errors
    /// [`SnapshotError::Run`] for a run that is empty, is not of whole pages, ends past the RAM or
    /// begins before the last one ended. Otherwise as [`write_diff`](Self::write_diff).
    pub fn write_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: impl Fn() -> I,
    ) -> Result<(), SnapshotError> {
        let count = self.check_runs(runs(), self.page_size)?;
        match &self.held {
            Held::ByFooter(_) => self.declare_zeros(&runs, count),
            Held::All => self.dig_zeros(&runs),
            Held::Nothing | Held::ByHoles(_) | Held::ByCaller => {
                self.write_pages(&Zeros, runs, None).map(drop)
            }
        }
    }

    /// Has the footer name zeros. Pages that have a place in the file already become zeros there.
    fn declare_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: &impl Fn() -> I,
        count: u64,
    ) -> Result<(), SnapshotError> {
        self.check_diff(count)?;
        let placed = self.held.sealing().map_or_else(Vec::new, |sealing| {
            let placed = runs().flat_map(|run| sealing.placed(run));
            placed.collect()
        });
        if placed.is_empty() {
            self.begin()?;
        } else {
            self.write_pages(&Zeros, || placed.iter().cloned(), None)?;
        }
        if let Held::ByFooter(sealing) = &mut self.held {
            sealing.add_zeros(runs());
        }
        self.state = State::Whole;
        Ok(())
    }

    /// Makes holes in a raw file that holds all of the RAM, or writes zeros where the file system
    /// has none.
    fn dig_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: &impl Fn() -> I,
    ) -> Result<(), SnapshotError> {
        self.begin()?;
        for run in runs() {
            match punch_hole(self.stage.file(), run.clone()) {
                Ok(()) => {}
                Err(SpaceError::Unsupported { .. }) => {
                    self.state = State::Whole;
                    return self.write_pages(&Zeros, runs, None).map(drop);
                }
                Err(error) => {
                    let dest = self.stage.dest_path().to_owned();
                    return Err(SnapshotError::from_punch(dest, run.start, error));
                }
            }
        }
        self.state = State::Whole;
        Ok(())
    }

    /// Writes the pages of the memory file that `runs` reach into. `ram` is the guest-physical
    /// address at which the RAM starts, if a bitmap says so.
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
            self.learn_ram_start(ram);
        }
        self.begin()?;
        let read_untouched = self.read_untouched;
        let (sink, watch) = self.sink();
        let meter = Meter::new(watch, page_size, total);
        // What is marked was written, so it is there. Where so much is marked, it may be all of the
        // RAM, touched or not; asking takes less time than writing then.
        let reader = &if read_untouched {
            Touched::unknown(reader, ram_size).without_faulting_in()
        } else if total >= ram_size / ASK_FROM {
            Touched::new(reader, ram_size)
        } else {
            Touched::unknown(reader, ram_size)
        };
        let written = sink.write(reader, pages(), total, Some(count), &meter)?;
        self.state = State::Whole;
        Ok(written / page_size)
    }

    /// Checks that runs are ascending, apart, inside the RAM, and begin and end at multiples of
    /// `unit`. Returns how many they are.
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

    /// Whether a bitmap is one of this RAM, as far as that is known.
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

    /// Takes the start of a bitmap that was [checked](Self::check_bitmap) for that of the RAM.
    fn learn_ram_start(&mut self, ram_start: u64) {
        self.ram_start = Some(ram_start);
        if let Held::ByFooter(sealing) = &mut self.held {
            sealing.set_ram_start(ram_start);
        }
    }

    /// Whether a footer can say that this is a diff of `runs` runs, and a chain would take it.
    fn check_diff(&self, runs: u64) -> Result<(), SnapshotError> {
        let Held::ByFooter(sealing) = &self.held else {
            return Ok(());
        };
        let dest = || self.stage.dest_path().to_owned();
        if sealing.parent() == Parent::Unnamed && !sealing.is_full() {
            return Err(SnapshotError::DiffWithoutParent { dest: dest() });
        }
        let room = sealing.check_room(runs);
        room.map_err(|source| SnapshotError::Seal {
            dest: dest(),
            source,
        })
    }

    /// Whether a raw diff with `runs` of pages can be read back.
    fn check_raw_diff(
        &mut self,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<(), SnapshotError> {
        if self.state == State::Incomplete {
            return Ok(());
        }
        let check = || {
            if matches!(self.held, Held::Nothing) {
                let begun = RawDiff::begin(self.stage.file(), self.ram_size, self.page_size)?;
                self.held = Held::ByHoles(begun);
            }
            match &self.held {
                Held::ByHoles(diff) => diff.check_hole_is_left(runs),
                Held::Nothing | Held::All | Held::ByCaller | Held::ByFooter(_) => Ok(()),
            }
        };
        let dest = || self.stage.dest_path().to_owned();
        check().map_err(|source| SnapshotError::AmbiguousDiff {
            dest: dest(),
            source,
        })
    }

    /// What of the replaced file the snapshot will not have; see [`atomic_file::AtomicWriter::not_preserved`].
    #[must_use]
    pub fn not_preserved(&self) -> &[NotPreserved] {
        self.stage.not_preserved()
    }

    /// Where a write goes, and who watches it.
    fn sink(&mut self) -> (Sink<'_>, &mut Watch) {
        let sink = Sink {
            stage: &self.stage,
            options: &self.write,
            unwritten: &mut self.unwritten,
            held: &mut self.held,
        };
        (sink, &mut self.watch)
    }

    /// Whatever ends the write from here on but its success leaves the writer incomplete.
    fn begin(&mut self) -> Result<(), SnapshotError> {
        if self.state == State::Incomplete {
            return Err(self.incomplete());
        }
        self.state = State::Incomplete;
        Ok(())
    }

    /// Syncs the file, puts it at its destination, and syncs the directory: once this has returned, the snapshot is there after a power loss
    /// too (see [`Options::durability`]).
    ///
    /// # Errors
    /// [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`], [`SnapshotError::MemoryIo`] (a recycled file could not
    /// be wiped), [`SnapshotError::AmbiguousDiff`] and [`SnapshotError::Seal`]: the destination is as it was.
    /// [`SnapshotError::Commit`] says which of old and new is there. Nothing is left behind but what the error names.
    pub fn commit(self) -> Result<(), SnapshotError> {
        Ok(self.finish()?.commit()?)
    }

    /// Commits as [`commit`](Self::commit) does, and releases the epoch whose pages were written once that has returned. On any
    /// error, the marks are back in the bitmap.
    ///
    /// It first [checks](Self::check_epoch) that every page of the epoch was written. Once the epoch was
    /// [reclaimed](DirtyBitmap::reclaim_epoch), nothing is committed: a later save may have put its own file there. While the
    /// commit runs, the epoch can't be reclaimed.
    ///
    /// The marks are forgotten when the commit returns, whatever the [durability](crate::Options::durability). With
    /// [`Durability::Full`](crate::Durability::Full) the file is there after a power loss. With less than that the caller has chosen
    /// that it may not be: snapshots on top of it that are durable lack its pages then, and a chain with an empty or torn raw file in it
    /// is wrong without notice.
    ///
    /// # Errors
    /// [`SnapshotError::BitmapSize`], [`SnapshotError::BitmapStart`], [`SnapshotError::EpochNotWritten`] and
    /// [`SnapshotError::EpochReclaimed`]: nothing was committed. Otherwise as [`commit`](Self::commit).
    pub fn commit_and_release<K, B: Deref<Target = DirtyBitmap<K>>>(
        mut self,
        epoch: Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        self.check_epoch(&epoch)?;
        let dest = self.stage.dest_path().to_owned();
        epoch
            .release_after(|| self.commit())
            .map_err(|error| match error {
                ReleaseError::Commit(error) => error,
                ReleaseError::Reclaimed(source) => SnapshotError::EpochReclaimed { dest, source },
            })
    }

    /// Checks that every page that `epoch` has taken a mark of was written after that.
    ///
    /// The epoch's bitmap is also what the writer learns the start of the RAM from, if neither
    /// [`Options::ram_start`] nor a diff said it before: a full image and the diffs on top of it
    /// name the same addresses then. So this comes before [`finish`](Self::finish), which writes
    /// them.
    ///
    /// [`commit_and_release`](Self::commit_and_release) does so. Call it where the file is committed otherwise, as part of a group:
    /// before [`finish`](Self::finish), which [`Epoch::release_after`] may run along with the group's commit.
    ///
    /// What counts is what this writer wrote: a [full write](Self::write_full) that began after the
    /// marks were taken, and [diffs](Self::write_diff) of [`Epoch::bitmap`] or of what
    /// [`Epoch::take_more`] returned. A diff of the bitmap that the guest marks does not count, nor
    /// does [`share_full`](Self::share_full), which also undoes the writes before it. A
    /// [clean](DirtyBitmap::is_clean) part needs no write. Whether a full write was of the RAM that
    /// the epoch's bitmap is about, only the caller knows: the size is compared, and the start with
    /// what was said of it.
    ///
    /// # Errors
    /// [`SnapshotError::EpochNotWritten`], [`SnapshotError::BitmapSize`] and [`SnapshotError::BitmapStart`].
    pub fn check_epoch<K, B: Deref<Target = DirtyBitmap<K>>>(
        &mut self,
        epoch: &Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        self.check_bitmap(epoch.bitmap())?;
        if !self.written.covers(epoch) {
            return Err(SnapshotError::EpochNotWritten {
                dest: self.stage.dest_path().to_owned(),
            });
        }
        self.learn_ram_start(epoch.bitmap().ram_start());
        Ok(())
    }

    /// The staged file, whole and ready to be committed as part of an [`atomic_file::AtomicGroup`], beside the vCPUs' state, say.
    ///
    /// # Errors
    /// [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`], [`SnapshotError::MemoryIo`] (a recycled file could not
    /// be wiped), [`SnapshotError::AmbiguousDiff`] and [`SnapshotError::Seal`]: the destination is as it was, and nothing is left behind.
    pub fn finish(self) -> Result<AtomicWriter, SnapshotError> {
        let dest = || self.stage.dest_path().to_owned();
        match self.state {
            State::Whole => {}
            State::Incomplete => return Err(self.incomplete()),
            State::Empty => return Err(SnapshotError::NothingWritten { dest: dest() }),
        }
        let file = self.stage.file();
        if let Some(unwritten) = &self.unwritten {
            unwritten
                .wipe(file, &self.write)
                .map_err(|error| SnapshotError::from_wipe(dest(), error))?;
        }
        match self.held {
            Held::ByHoles(diff) => {
                diff.check_written(file)
                    .map_err(|source| SnapshotError::AmbiguousDiff {
                        dest: dest(),
                        source,
                    })?;
            }
            Held::ByFooter(sealing) => {
                sealing
                    .seal(file)
                    .map_err(|error| SnapshotError::from_seal(dest(), error))?;
            }
            Held::Nothing | Held::All | Held::ByCaller => {}
        }
        Ok(self.stage)
    }

    fn in_place(&self) -> bool {
        self.held
            .sealing()
            .is_none_or(|sealing| sealing.map.placement() == Placement::InPlace)
    }

    fn incomplete(&self) -> SnapshotError {
        SnapshotError::Incomplete {
            dest: self.stage.dest_path().to_owned(),
        }
    }
}

/// A new file is grown; a recycled one may be longer.
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

/// Makes zeros of what a recycled file has between the header of a packed image and its first page.
fn wipe_header(file: &File, data_start: u64, options: &WriteOptions) -> Result<(), WipeError> {
    if data_start > packed_start(0) {
        let mut rest = Unwritten::all(data_start, packed_start(0));
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
