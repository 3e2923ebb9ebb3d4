//! Open, write, commit.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use atomic_file::{AtomicWriter, NotPreserved};
use dirty_bitmap::{Coverage, DirtyBitmap, Epoch, ReleaseError};
use image_format::{ImageId, MAX_RAM_SIZE, Placement, RAW_UNIT, packed_start};
use page_reader::{PageReader, Touched};
use sparse_file::{SpaceError, WriteOptions, grow, share_blocks};

use crate::error::{RamError, SnapshotError};
use crate::layout::{Layout, Parent};
use crate::meter::Meter;
use crate::needed::{Needed, Skip};
use crate::options::{Options, Watch};
use crate::pages::WholePages;
use crate::raw_diff::RawDiff;
use crate::sealing::Sealing;
use crate::sink::Sink;
use crate::unwritten::{Unwritten, WipeError};

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
    /// What the footer is to say, if the file gets one.
    sealing: Option<Sealing>,
    /// The pages of a raw diff, unless all of the RAM was written or [`Options::allow_ambiguous_diff`] was given.
    raw_diff: Option<RawDiff>,
    /// Whether all of the RAM was written.
    full: bool,
    allow_ambiguous: bool,
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
        let stage = options.stage(dest)?;
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
            sealing,
            raw_diff: None,
            full: false,
            allow_ambiguous,
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
        self.sealing.as_ref().map(Sealing::id)
    }

    /// Keeps `bytes` with the snapshot in place of [`Seal::metadata`](crate::Seal::metadata): the vCPUs' state, as it is once they are paused.
    ///
    /// # Errors
    /// [`SnapshotError::NotSealed`]: a raw file has no place for them. [`SnapshotError::Seal`] for more than 16 MiB. Either way the writer stays as it
    /// was.
    pub fn set_metadata(&mut self, bytes: impl Into<Vec<u8>>) -> Result<(), SnapshotError> {
        match &mut self.sealing {
            Some(sealing) => {
                sealing
                    .set_metadata(bytes.into())
                    .map_err(|source| SnapshotError::Seal {
                        dest: self.stage.dest_path().to_owned(),
                        source,
                    })
            }
            None => Err(SnapshotError::NotSealed {
                dest: self.stage.dest_path().to_owned(),
            }),
        }
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
        if self
            .sealing
            .as_ref()
            .is_some_and(|seal| matches!(seal.parent(), Parent::Image(_)))
        {
            return Err(SnapshotError::FullWithParent {
                dest: self.stage.dest_path().to_owned(),
            });
        }
        let written_before = self.state != State::Empty;
        self.begin()?;
        let began = Coverage::begin_full();
        self.raw_diff = None;
        if let Some(sealing) = &mut self.sealing {
            sealing.begin_full();
        }
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
        self.full = true;
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
        if self.sealing.is_some() {
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
        self.raw_diff = None;
        self.full = true;
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
        let ram = *self.ram_start.get_or_insert(dirty.ram_start());
        let (ram_size, page_size) = (self.ram_size, self.page_size);
        let pages = || WholePages::new(dirty.runs(), page_size);
        let (mut runs, mut total) = (0, 0);
        pages().for_each(|run| {
            runs += 1;
            total += run.end - run.start;
        });
        self.check_diff(runs)?;
        self.check_raw_diff(pages())?;
        if let Some(sealing) = &mut self.sealing {
            sealing.set_ram_start(ram);
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
        let written = sink.write(reader, pages(), total, Some(runs), &meter)?;
        self.written.add_diff(dirty);
        self.state = State::Whole;
        Ok(written / page_size)
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

    /// Whether a footer can say that this is a diff of `runs` runs, and a chain would take it.
    fn check_diff(&self, runs: u64) -> Result<(), SnapshotError> {
        let Some(sealing) = &self.sealing else {
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
        let raw = self.sealing.is_none() && !self.full && !self.allow_ambiguous;
        if !raw || self.state == State::Incomplete {
            return Ok(());
        }
        let check = || {
            let diff = match self.raw_diff.take() {
                Some(diff) => diff,
                None => RawDiff::begin(self.stage.file(), self.ram_size, self.page_size)?,
            };
            let left = diff.check_hole_is_left(runs);
            self.raw_diff = Some(diff);
            left
        };
        check().map_err(|source| SnapshotError::AmbiguousDiff {
            dest: self.stage.dest_path().to_owned(),
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
            sealing: &mut self.sealing,
            raw_diff: &mut self.raw_diff,
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
        self,
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
    /// [`commit_and_release`](Self::commit_and_release) does so. Call it where the file is committed otherwise, as part of a group:
    /// before [`finish`](Self::finish), which [`Epoch::release_after`] may run along with the group's commit.
    ///
    /// What counts is what this writer wrote: a [full write](Self::write_full) that began after the marks were taken, and
    /// [diffs](Self::write_diff) of [`Epoch::bitmap`] or of what [`Epoch::take_more`] returned. A diff of the bitmap that the guest marks
    /// does not count, nor does [`share_full`](Self::share_full), which also undoes the writes before it. A
    /// [clean](DirtyBitmap::is_clean) part needs no write. Whether a full write was of the RAM that the epoch's bitmap is
    /// about, only the caller knows: the size is compared, and the start where [`Options::ram_start`] or a diff has told it.
    ///
    /// # Errors
    /// [`SnapshotError::EpochNotWritten`], [`SnapshotError::BitmapSize`] and [`SnapshotError::BitmapStart`].
    pub fn check_epoch<K, B: Deref<Target = DirtyBitmap<K>>>(
        &self,
        epoch: &Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        self.check_bitmap(epoch.bitmap())?;
        if self.written.covers(epoch) {
            return Ok(());
        }
        Err(SnapshotError::EpochNotWritten {
            dest: self.stage.dest_path().to_owned(),
        })
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
        if let Some(diff) = &self.raw_diff {
            diff.check_written(file)
                .map_err(|source| SnapshotError::AmbiguousDiff {
                    dest: dest(),
                    source,
                })?;
        }
        if let Some(sealing) = self.sealing {
            sealing
                .seal(file)
                .map_err(|error| SnapshotError::from_seal(dest(), error))?;
        }
        Ok(self.stage)
    }

    fn in_place(&self) -> bool {
        self.sealing
            .as_ref()
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
