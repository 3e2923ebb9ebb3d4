//! The data and hole ranges of an open file.

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::iter::FusedIterator;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::holes::{HolesUnknown, check_holes_are_zeros};
use crate::sys;

/// Whether a range is stored or reads as zeros without being stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Stored, or not known not to be: the bytes may be anything, zeros too.
    Data,
    /// Reads as zeros. A range that was only reserved (`fallocate`) and never written counts as a hole.
    Hole,
}

/// A range of a file, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The bytes it covers; never empty.
    pub range: Range<u64>,
    /// Data or hole.
    pub kind: Kind,
}

/// What [`Extents`] rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Knowledge {
    /// The file system reported holes and data.
    Reported,
    /// The file system reported that the whole range is data: it has no hole, or this file system
    /// reports everything as data.
    NoHoleReported,
    /// What the file system reports is not used: [`check_holes_are_zeros`] says why. The one data
    /// extent is a safe assumption.
    NotUsed,
    /// The file system has no `SEEK_HOLE`. The one data extent is a safe assumption.
    Unsupported,
    /// The rest of the range was listed as data without asking: the calls allowed by
    /// [`Extents::limit_calls`] were used up, the file changed meanwhile (on overlayfs: its file
    /// system too), or the file system gave an answer that it cannot give for such an offset.
    CutShort,
}

/// Lists the extents of `file` from 0 to its length at the time of this call.
///
/// The ranges cover `[0, len)` without gap or overlap, and neighbours differ in kind. A hole is
/// listed only where it is known to read as zeros: the file system is one whose reports are
/// [used](check_holes_are_zeros), and it reported the hole. Everything else is data.
///
/// The listing costs one `lseek(2)` an extent. A file that grows meanwhile is listed up to its old
/// length. What a shrinking file loses is listed as data, so that reading it fails. What is written
/// into a hole after the hole was reported is not in the listing.
///
/// The *file position* moves and is put back when the iterator drops, so don't `read` or `seek`
/// through this descriptor meanwhile. Positioned I/O (`read_at`, `pwrite`) is not affected.
///
/// # Errors
/// Those of `fstat(2)`, `fstatfs(2)` and `lseek(2)`.
///
/// # Examples
/// ```
/// use sparse_file::{Kind, extents};
/// use std::os::unix::fs::FileExt;
///
/// let file = tempfile::tempfile()?;
/// file.set_len(1 << 20)?;
/// file.write_all_at(b"data", 512 << 10)?;
///
/// let extents = extents(&file)?;
/// if extents.are_exact() {
///     let stored: u64 = extents
///         .filter_map(|extent| extent.ok().filter(|extent| extent.kind == Kind::Data))
///         .map(|extent| extent.range.end - extent.range.start)
///         .sum();
///     assert!((4..1 << 20).contains(&stored));
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn extents(file: &File) -> io::Result<Extents<&File>> {
    let len = file.metadata()?.len();
    extents_in(file, 0..len)
}

/// Lists the extents of `range` of `file`, as [`extents`] lists those of a whole file.
///
/// What of the range is past the end of the file is listed as data, so that reading it fails.
///
/// # Errors
/// As [`extents`].
pub fn extents_in<F: Borrow<File>>(file: F, range: Range<u64>) -> io::Result<Extents<F>> {
    match check_holes_are_zeros(file.borrow()) {
        Ok(()) => {
            let layered = sys::is_layered(file.borrow())?;
            reported_extents_in(file, range, layered)
        }
        Err(HolesUnknown::Io(error)) => Err(error),
        Err(_) => {
            let mut extents = Extents::new(file, range)?;
            extents.ahead = extents.rest_is_data(Knowledge::NotUsed).map(Ok);
            Ok(extents)
        }
    }
}

/// Lists what the file system reports, also where it is not [used](check_holes_are_zeros).
///
/// What it lists as a hole may hold data. For reports about a file system, and for users who insist
/// that the holes are right. Otherwise as [`extents`].
///
/// # Errors
/// As [`extents`].
pub fn reported_extents(file: &File) -> io::Result<Extents<&File>> {
    let len = file.metadata()?.len();
    reported_extents_in(file, 0..len, false)
}

fn reported_extents_in<F: Borrow<File>>(
    file: F,
    range: Range<u64>,
    confirm: bool,
) -> io::Result<Extents<F>> {
    let mut extents = Extents::new(file, range)?;
    extents.confirm = confirm;
    // The first boundary is looked up here, so that `knowledge` has an answer before the first
    // extent is taken.
    extents.ahead = match extents.find() {
        Err(error) if is_unsupported(&error) => {
            extents.rest_is_data(Knowledge::Unsupported).map(Ok)
        }
        found => found.transpose(),
    };
    if let Some(Ok(first)) = &extents.ahead
        && first.kind == Kind::Data
        && first.range.end >= extents.end
        && extents.knowledge == Knowledge::Reported
    {
        extents.knowledge = Knowledge::NoHoleReported;
    }
    Ok(extents)
}

/// The extents of a file in ascending order: see [`extents`].
#[derive(Debug)]
pub struct Extents<F: Borrow<File> = File> {
    file: F,
    /// The length of the file when the listing began.
    len: u64,
    /// Where the range ends.
    end: u64,
    /// Everything below has been found.
    at: u64,
    /// What `at` is listed as until the next boundary. It is a hole only where `SEEK_HOLE` has just
    /// returned `at`.
    kind: Kind,
    knowledge: Knowledge,
    /// Whether the file may have been moved to another file system before a hole was reported
    /// (overlayfs): ask again after each.
    confirm: bool,
    calls_left: u64,
    /// Found, but not yet known to end there: its neighbour may be of the same kind.
    ahead: Option<io::Result<Extent>>,
    position: libc::off_t,
}

impl<F: Borrow<File>> Extents<F> {
    fn new(file: F, range: Range<u64>) -> io::Result<Self> {
        let len = file.borrow().metadata()?.len();
        let position = lseek(file.borrow(), 0, Whence::SeekCur)?;
        Ok(Self {
            file,
            len,
            end: range.end.max(range.start),
            at: range.start,
            kind: Kind::Data,
            knowledge: Knowledge::Reported,
            confirm: false,
            calls_left: u64::MAX,
            ahead: None,
            position,
        })
    }

    /// What the listing rests on, so far: [`Knowledge::CutShort`] may still come.
    #[must_use]
    pub fn knowledge(&self) -> Knowledge {
        self.knowledge
    }

    /// Whether the file system itself told holes from data. Where not, "data" means no more than
    /// "perhaps data".
    #[must_use]
    pub fn are_exact(&self) -> bool {
        self.knowledge == Knowledge::Reported
    }

    /// Allows `calls` more calls of `lseek(2)`; when they are used up, the rest of the file is
    /// listed as data and [`knowledge`](Self::knowledge) is [`Knowledge::CutShort`].
    ///
    /// For file systems where such a call is slow, and reading data takes less time than looking
    /// for holes.
    #[must_use]
    pub fn limit_calls(mut self, calls: u64) -> Self {
        self.calls_left = calls;
        self
    }

    fn seek(&mut self, whence: Whence) -> io::Result<Option<u64>> {
        self.calls_left = self.calls_left.saturating_sub(1);
        let at = libc::off_t::try_from(self.at).map_err(io::Error::other)?;
        match lseek(self.file.borrow(), at, whence) {
            Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next range as the file system gives it; may be of the same kind as the one before.
    fn find(&mut self) -> io::Result<Option<Extent>> {
        // A boundary where one was just found means that the file changes. Accept that once.
        for _ in 0..2 {
            if self.at >= self.end {
                return Ok(None);
            }
            if self.calls_left == 0 || self.at >= self.len {
                break;
            }
            let (next, found) = match self.kind {
                Kind::Data => (Kind::Hole, self.seek(Whence::SeekHole)?),
                Kind::Hole => (Kind::Data, self.seek(Whence::SeekData)?),
            };
            let end = match (self.kind, found) {
                // No answer to a question about the bytes from here on.
                (_, Some(end)) if end < self.at => break,
                (_, Some(end)) => end.min(self.len),
                // No data from here on, if the file still reaches as far.
                (Kind::Hole, None) => self.file.borrow().metadata()?.len().min(self.len),
                // There is a hole at the end of every file, so this is past the end of a file that
                // shrank, or no answer: APFS gives it for clones, with data behind.
                (Kind::Data, None) => break,
            };
            if self.kind == Kind::Hole && self.confirm && !self.are_holes_zeros()? {
                break;
            }
            let end = end.min(self.end);
            let kind = std::mem::replace(&mut self.kind, next);
            if end > self.at {
                return Ok(Some(self.advance(end, kind)));
            }
        }
        Ok(self.rest_is_data(Knowledge::CutShort))
    }

    fn are_holes_zeros(&self) -> io::Result<bool> {
        match check_holes_are_zeros(self.file.borrow()) {
            Ok(()) => Ok(true),
            Err(HolesUnknown::Io(error)) => Err(error),
            Err(_) => Ok(false),
        }
    }

    fn rest_is_data(&mut self, knowledge: Knowledge) -> Option<Extent> {
        self.knowledge = knowledge;
        (self.at < self.end).then(|| self.advance(self.end, Kind::Data))
    }

    fn advance(&mut self, end: u64, kind: Kind) -> Extent {
        let range = self.at..end;
        self.at = end;
        Extent { range, kind }
    }
}

impl<F: Borrow<File>> Iterator for Extents<F> {
    type Item = io::Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.ahead.take().or_else(|| self.find().transpose())?;
        let mut extent = match first {
            Ok(extent) => extent,
            Err(error) => {
                self.at = self.end;
                return Some(Err(error));
            }
        };
        loop {
            match self.find() {
                Ok(Some(next)) if next.kind == extent.kind => extent.range.end = next.range.end,
                next => {
                    self.ahead = next.transpose();
                    return Some(Ok(extent));
                }
            }
        }
    }
}

impl<F: Borrow<File>> FusedIterator for Extents<F> {}

impl<F: Borrow<File>> Drop for Extents<F> {
    fn drop(&mut self) {
        // It was the position a moment ago, so the call can't fail but by another's doing.
        let _ = lseek(self.file.borrow(), self.position, Whence::SeekSet);
    }
}

/// `lseek(2)` gives EINVAL for a `whence` that it doesn't know; network and FUSE file systems pass on the others.
fn is_unsupported(error: &io::Error) -> bool {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else {
        return false;
    };
    errno == Errno::EOPNOTSUPP
        || matches!(
            errno,
            Errno::EINVAL | Errno::ENOTSUP | Errno::ENOTTY | Errno::ENOSYS
        )
}
