//! Errors of taking snapshots.

mod failed_io;
mod memory_io;
mod open_file;
mod ram;
mod write_ambiguity;

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use atomic_file::{CommitError, OpenError};
use dirty_bitmap::EpochReclaimed;
use image_format::{FooterError, ImageId, RegionList};
use thiserror::Error;

pub use memory_io::MemoryIoStep;
pub use open_file::OpenFileError;
pub use ram::RamError;
pub use write_ambiguity::WriteAmbiguity;

/// An error of taking a snapshot. The destination is unchanged, except after
/// [`Commit`](Self::Commit), which states what is there.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The size of the RAM or of a page is invalid.
    #[error("invalid RAM geometry: {0}")]
    Ram(#[from] RamError),
    /// The file could not be staged. For a link to an open file, such as `/dev/stdout`
    /// ([`OpenError::MagicLink`]), pass the open file to
    /// [`MemoryWriterOptions::open_file`](crate::MemoryWriterOptions::open_file), or to a
    /// [`PackedStream`](crate::PackedStream) if it may be a pipe.
    #[error("failed to stage the snapshot: {0}")]
    Open(#[from] OpenError),
    /// A snapshot cannot be written to the open file.
    #[error("failed to write the snapshot to an open file: {0}")]
    OpenFile(#[from] OpenFileError),
    /// The snapshot is written to an open file, which is not staged.
    #[error("the snapshot {dest:?} is not staged: call commit instead of finish")]
    NotStaged {
        /// The name of the file.
        dest: PathBuf,
    },
    /// The stream has begun. Its header states its length, so it takes one write, and no other
    /// metadata afterwards.
    #[error(
        "the stream {dest:?} has begun: set the metadata first, and write once; use a MemoryWriter \
         for several writes"
    )]
    StreamBegun {
        /// The name of the stream.
        dest: PathBuf,
    },
    /// Guest memory could not be read, or the staged file could not be written.
    #[error("{step} failed at offset {offset:#x} for the snapshot {dest:?}{}: \
         {source}", step.advice(source))]
    MemoryIo {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The step that failed.
        step: MemoryIoStep,
        /// The offset of the first missing byte in the file, or of the first unreadable byte in the
        /// RAM.
        offset: u64,
        /// The error of the reader or of the system.
        source: io::Error,
    },
    /// The reader [reports](page_reader::PageReader::check_source) that its source changed.
    #[error(
        "the source of the snapshot {dest:?} may have changed while it was read: keep it unchanged, \
         and take the snapshot again: {source}"
    )]
    Source {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The error of the reader.
        source: io::Error,
    },
    /// The bitmap and the memory file differ in size.
    #[error(
        "the bitmap covers {bitmap} bytes, but the memory file has {file}: pass the bitmap of \
         this guest's RAM"
    )]
    BitmapSize {
        /// The number of bytes that the bitmap covers.
        bitmap: u64,
        /// The size of the memory file in bytes.
        file: u64,
    },
    /// The bitmap starts at another guest-physical address than
    /// [`MemoryWriterOptions::ram_start`](crate::MemoryWriterOptions::ram_start) or the previous
    /// bitmap, or at neither the guest-physical start of the reader's RAM nor 0, the start of the
    /// memory file.
    #[error(
        "the bitmap starts at {bitmap:#x}, but this guest's RAM starts at {ram:#x}: pass the bitmap of \
         this guest's RAM"
    )]
    BitmapStart {
        /// The first address that the bitmap covers.
        bitmap: u64,
        /// The first address of the RAM.
        ram: u64,
    },
    /// A run of bytes is empty, ends past the RAM, begins before the previous run ended, or is not
    /// of whole pages where these are required.
    #[error(
        "invalid run {start:#x}..{end:#x} of pages of {page_size} bytes in RAM of {ram_size} \
         bytes: pass runs that ascend, do not overlap and are inside the RAM"
    )]
    Run {
        /// The first byte of the run.
        start: u64,
        /// The end of the run, exclusive.
        end: u64,
        /// The size of a page of the memory file in bytes.
        page_size: u64,
        /// The size of the memory file in bytes.
        ram_size: u64,
    },
    /// The runs of a write in order of the caller ended before all pages were returned.
    #[error(
        "the runs for the snapshot {dest:?} lack {bytes} bytes of the RAM, the first at offset \
         {first:#x}: return each page once"
    )]
    MissingPages {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The offset of the first missing page in the RAM.
        first: u64,
        /// The number of missing bytes.
        bytes: u64,
    },
    /// The writer has written pages before, and this write must be its first.
    #[error(
        "pages of the snapshot {dest:?} were written before: open a new writer for a diff in order \
         of the caller"
    )]
    WrittenBefore {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// A [`CancelToken`](crate::CancelToken) cancelled the write.
    #[error("the snapshot {dest:?} was cancelled after {written} bytes of this write")]
    Cancelled {
        /// The snapshot's destination.
        dest: PathBuf,
        /// Bytes that the cancelled call had written.
        written: u64,
    },
    /// An earlier write failed, panicked or was cancelled, so the staged file may lack pages.
    #[error(
        "the snapshot {dest:?} is incomplete, because an earlier write failed: open a new writer"
    )]
    Incomplete {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// Nothing was written, so nothing can be committed.
    #[error("the snapshot {dest:?} is empty: call write_full or write_diff first")]
    NothingWritten {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// The system provided no random numbers for the snapshot's id.
    #[error("failed to generate an id for the snapshot {dest:?}: pass one to Seal::id: {source}")]
    Id {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// All of the RAM was written although [`Seal::parent`](crate::Seal::parent) was set: a full
    /// snapshot has no parent.
    #[error("the full snapshot {dest:?} has a parent: omit Seal::parent")]
    FullWithParent {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// The reader's RAM is at other guest-physical addresses than a sealed or packed snapshot would
    /// record. Nothing was written.
    #[error(
        "the snapshot {dest:?} would record RAM at {}, but the reader has RAM at {}: pass the \
         layout of this guest's RAM to Seal::ram_layout",
        RegionList(snapshot),
        RegionList(reader)
    )]
    Regions {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The address ranges that the snapshot would record.
        snapshot: Vec<Range<u64>>,
        /// The address ranges of the [reader](page_reader::PageReader::ram_layout).
        reader: Vec<Range<u64>>,
    },
    /// The reader's RAM and the memory file differ in [size](page_reader::PageReader::known_size).
    /// Nothing was written.
    #[error(
        "the snapshot {dest:?} has {file} bytes of RAM, but the reader has {reader}: pass the size \
         of this guest's RAM when the writer is opened"
    )]
    ReaderSize {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The size of the memory file in bytes.
        file: u64,
        /// The size of the reader's RAM in bytes.
        reader: u64,
    },
    /// A sealed or packed diff was to be written without [`Seal::parent`](crate::Seal::parent): no
    /// chain of images with ids accepts it.
    #[error(
        "the diff {dest:?} has no parent: pass the id of the previous image to Seal::parent, or use \
         Seal::on_raw_image if it has no id"
    )]
    DiffWithoutParent {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// The diff names another parent than the image whose commit released the marks of the bitmap
    /// last. A chain of the two would lack the pages of that image. Nothing was written.
    #[error(
        "the diff {dest:?} names image {parent} as its parent, but its bitmap has the marks since \
         image {newest}: pass that id to Seal::parent, or call DirtyBitmap::set_parent_id if the \
         bitmap has all marks since image {parent}"
    )]
    StaleParent {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The id that was passed to [`Seal::parent`](crate::Seal::parent).
        parent: ImageId,
        /// The id of the image that the marks build on: the bitmap's
        /// [`parent`](dirty_bitmap::DirtyBitmap::parent).
        newest: ImageId,
    },
    /// The diff names a raw image as its parent, but an image with an id released the marks of the
    /// bitmap last. Nothing was written.
    #[error(
        "the diff {dest:?} names a raw image as its parent, but its bitmap has the marks since image \
         {newest}: pass that id to Seal::parent, or call DirtyBitmap::set_parent_id with None if the \
         raw image has the state of image {newest}"
    )]
    RawParent {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The id of the image that the marks build on: the bitmap's
        /// [`parent`](dirty_bitmap::DirtyBitmap::parent).
        newest: ImageId,
    },
    /// The diff names an image with an id as its parent, but a raw image released the marks of the
    /// bitmap last. A chain of the two would lack the pages of the raw image. Nothing was written.
    #[error(
        "the diff {dest:?} names image {parent} as its parent, but its bitmap has the marks since a \
         raw image: use Seal::on_raw_image, or call DirtyBitmap::set_parent_id with the id of image \
         {parent} if that has the state of the raw image"
    )]
    ParentNotRaw {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The id that was passed to [`Seal::parent`](crate::Seal::parent).
        parent: ImageId,
    },
    /// The diff would replace its parent, or an image that its [seal](crate::Seal::ancestors) lists
    /// below that, and no chain could be read without it. Nothing was committed.
    #[error(
        "the diff {dest:?} would replace an image that it builds on, {parent}: write it to another \
         path, or set MemoryWriterOptions::allow_replacing_parent if another file has that image"
    )]
    ReplacesParent {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The id of the image at the destination.
        parent: ImageId,
    },
    /// Metadata was passed for a raw snapshot.
    #[error(
        "the snapshot {dest:?} is raw and cannot store metadata: choose Layout::Sealed or \
         Layout::Packed"
    )]
    NotSealed {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// The pages of a raw diff cannot be distinguished from its holes. If `write_diff` returned
    /// this, nothing was written.
    #[error(
        "the raw diff {dest:?} could not be read back: choose Layout::Sealed or Layout::Packed, \
         which list their pages: {source}"
    )]
    AmbiguousDiff {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The reason why the holes do not identify the pages.
        source: WriteAmbiguity,
    },
    /// The footer cannot be written. Reported as early as possible: before pages are written, if
    /// regions or metadata do not fit.
    #[error("failed to seal the snapshot {dest:?}: {source}")]
    Seal {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The limit of the footer that was exceeded, or the error of the system.
        source: FooterError,
    },
    /// The commit failed. Its error states whether the destination was replaced.
    #[error("failed to commit the snapshot: {0}")]
    Commit(#[from] CommitError),
    /// The epoch that was to be released has marks whose pages were not written since they were
    /// taken. Nothing was committed.
    #[error(
        "the snapshot {dest:?} was not committed, because it lacks pages of the epoch to release: pass \
         the epoch's bitmap, or what each extend returns, to write_diff, and begin a full write \
         after the epoch"
    )]
    EpochNotWritten {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// The marks of the epoch were reclaimed while the snapshot was taken. It was not committed: a
    /// later save may have committed its own file.
    #[error("the snapshot {dest:?} was not committed: {source}")]
    EpochReclaimed {
        /// The snapshot's destination.
        dest: PathBuf,
        /// The reason why the epoch cannot be released.
        source: EpochReclaimed,
    },
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(
        MemoryIoStep::Read,
        io::ErrorKind::UnexpectedEof,
        "reading guest memory",
        "must cover"
    )]
    #[case(
        MemoryIoStep::SetSize,
        io::ErrorKind::FileTooLarge,
        "size",
        "RLIMIT_FSIZE"
    )]
    #[case(MemoryIoStep::Wipe, io::ErrorKind::StorageFull, "wiping", "make room")]
    #[case(MemoryIoStep::Write, io::ErrorKind::QuotaExceeded, "writing", "quota")]
    fn an_error_names_the_step_and_says_what_to_do(
        #[case] step: MemoryIoStep,
        #[case] kind: io::ErrorKind,
        #[case] named: &str,
        #[case] advice: &str,
    ) {
        let error = SnapshotError::MemoryIo {
            dest: PathBuf::from("vm.mem"),
            step,
            offset: 0,
            source: kind.into(),
        };
        let text = error.to_string();
        assert!(text.contains(named) && text.contains(advice), "{text}");
    }
}
