//! Lists the data and hole ranges of an open file.

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::iter::FusedIterator;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::holes::{HolesUnknown, check_holes_are_zeros};
use crate::{sys, trace};

/// The kind of a range: stored, or a hole that reads as zeros without being stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Stored, or not known to be a hole. The bytes may have any value, including zero.
    Data,
    /// Reads as zeros. A range that was reserved (`fallocate`) and never written counts as a hole.
    Hole,
}

/// A contiguous range of a file that is all data or all hole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The range in bytes. Never empty.
    pub range: Range<u64>,
    /// Data or hole.
    pub kind: ExtentKind,
}

/// The source of the information in [`Extents`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExtentSource {
    /// The file system reported holes and data.
    Reported,
    /// The file system reported that the whole range is data: it has no hole, or this file system
    /// reports everything as data.
    NoHoleReported,
    /// The reports of the file system are not used: [`check_holes_are_zeros`] returns the reason.
    /// One data extent is a safe assumption.
    NotUsed,
    /// The file system does not support `SEEK_HOLE`. One data extent is a safe assumption.
    Unsupported,
    /// The rest of the range was listed as data without a query. Possible reasons: the calls that
    /// [`Extents::limit_calls`] permits were used up, the file changed during the listing (on
    /// overlayfs: or its file system, on ext4: or it lost its extents), or the file system returned
    /// a position that is invalid for the queried offset.
    CutShort,
}

/// Lists the extents of `file` from 0 to its length at the time of this call.
///
/// The ranges cover `[0, len)` without gap or overlap, and adjacent ranges differ in kind. A hole
/// is listed only where it is known to read as zeros: the reports of the file system are
/// [used](check_holes_are_zeros), and it reported the hole. Everything else is data.
///
/// The listing costs one `lseek(2)` an extent. A file that grows during the listing is listed up to
/// its old length. The removed part of a file that shrinks is listed as data, so that reading it
/// fails. Data that is written into a hole after the hole was reported is not in the listing.
///
/// The *file position* is moved and restored when the iterator is dropped. Do not `read` or `seek`
/// through this descriptor during the listing. Positioned I/O (`read_at`, `pwrite`) is not
/// affected.
///
/// # Errors
/// Returns the errors of `fstat(2)`, `fstatfs(2)` and `lseek(2)`.
///
/// # Examples
/// ```
/// use sparse_file::{ExtentKind, extents};
/// use std::os::unix::fs::FileExt;
///
/// let file = tempfile::tempfile()?;
/// file.set_len(1 << 20)?;
/// file.write_all_at(b"data", 512 << 10)?;
///
/// let extents = extents(&file)?;
/// if extents.are_exact() {
///     let stored: u64 = extents
///         .filter_map(|extent| extent.ok().filter(|extent| extent.kind == ExtentKind::Data))
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

/// Lists the extents of `range` of `file`, like [`extents`] for a whole file.
///
/// The part of the range past the end of the file is listed as data, so that reading it fails.
///
/// # Errors
/// Returns the errors of [`extents`].
pub fn extents_in<F: Borrow<File>>(file: F, range: Range<u64>) -> io::Result<Extents<F>> {
    match check_holes_are_zeros(file.borrow()) {
        Ok(()) => {
            let confirm = sys::may_change_reports(file.borrow())?;
            reported_extents_in(file, range, confirm)
        }
        Err(HolesUnknown::Io(error)) => Err(error),
        Err(why) => {
            trace::holes_not_used(&why);
            let mut extents = Extents::new(file, range)?;
            extents.ahead = extents.rest_is_data(ExtentSource::NotUsed).map(Ok);
            Ok(extents)
        }
    }
}

/// Lists the extents that the file system reports, even where its reports are not
/// [used](check_holes_are_zeros).
///
/// A listed hole may contain data. Use it for reports about a file system, or where other
/// information shows that the holes are correct. In all other respects, it works like [`extents`].
///
/// # Errors
/// Returns the errors of [`extents`].
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
    // Find the first boundary here, so that `source` is valid before the first extent is taken.
    extents.ahead = match extents.find() {
        Err(error) if sys::is_unsupported_argument(&error) => {
            extents.rest_is_data(ExtentSource::Unsupported).map(Ok)
        }
        found => found.transpose(),
    };
    if let Some(Ok(first)) = &extents.ahead
        && first.kind == ExtentKind::Data
        && first.range.end >= extents.end
        && extents.source == ExtentSource::Reported
    {
        extents.source = ExtentSource::NoHoleReported;
    }
    Ok(extents)
}

/// An iterator over the extents of a file in ascending order: see [`extents`].
#[derive(Debug)]
#[must_use = "iterators do nothing until they are consumed"]
pub struct Extents<F: Borrow<File> = File> {
    file: F,
    /// The length of the file when the listing began.
    len: u64,
    /// The end of the range to list.
    end: u64,
    /// The extents below this offset have been found.
    at: u64,
    /// The kind of the range from `at` to the next boundary. A hole only if `SEEK_HOLE` has just
    /// returned `at`.
    kind: ExtentKind,
    source: ExtentSource,
    /// Whether the reports for the file may have become unreliable before a hole was reported
    /// (overlayfs, ext4). If set, check again after each hole.
    confirm: bool,
    calls_left: u64,
    /// The extent that was found last. It may continue, because the next one may be of the same
    /// kind.
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
            kind: ExtentKind::Data,
            source: ExtentSource::Reported,
            confirm: false,
            calls_left: u64::MAX,
            ahead: None,
            position,
        })
    }

    /// Returns the source of the listing so far. Can still change to [`ExtentSource::CutShort`].
    #[must_use]
    pub fn source(&self) -> ExtentSource {
        self.source
    }

    /// Returns whether the file system reported holes and data. If not, an extent of data may
    /// contain holes.
    #[must_use]
    pub fn are_exact(&self) -> bool {
        self.source == ExtentSource::Reported
    }

    /// Limits the listing to `calls` more calls of `lseek(2)`. When they are used up, the rest of
    /// the file is listed as data and [`source`](Self::source) is [`ExtentSource::CutShort`].
    ///
    /// Use it on file systems where the call is slow and reading data takes less time than finding
    /// holes.
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

    /// Returns the next range that the file system reports. It may be of the same kind as the
    /// previous one.
    fn find(&mut self) -> io::Result<Option<Extent>> {
        // The same boundary twice means that the file changes. Accept this once.
        for _ in 0..2 {
            if self.at >= self.end {
                return Ok(None);
            }
            if self.calls_left == 0 || self.at >= self.len {
                break;
            }
            let (next, found) = match self.kind {
                ExtentKind::Data => (ExtentKind::Hole, self.seek(Whence::SeekHole)?),
                ExtentKind::Hole => (ExtentKind::Data, self.seek(Whence::SeekData)?),
            };
            let end = match (self.kind, found) {
                // Not a valid answer for the bytes from `at` on.
                (_, Some(end)) if end < self.at => break,
                (_, Some(end)) => end.min(self.len),
                // No more data. The hole ends at the end of the file, which may have shrunk.
                (ExtentKind::Hole, None) => self.file.borrow().metadata()?.len().min(self.len),
                // A hole follows the end of every file, so `at` is past the end of a file that
                // shrank, or the answer is wrong: APFS returns this for clones although data
                // follows.
                (ExtentKind::Data, None) => break,
            };
            if self.kind == ExtentKind::Hole && self.confirm && !self.are_holes_zeros()? {
                break;
            }
            let end = end.min(self.end);
            let kind = std::mem::replace(&mut self.kind, next);
            if end > self.at {
                return Ok(Some(self.advance(end, kind)));
            }
        }
        Ok(self.rest_is_data(ExtentSource::CutShort))
    }

    fn are_holes_zeros(&self) -> io::Result<bool> {
        match check_holes_are_zeros(self.file.borrow()) {
            Ok(()) => Ok(true),
            Err(HolesUnknown::Io(error)) => Err(error),
            Err(_) => Ok(false),
        }
    }

    fn rest_is_data(&mut self, source: ExtentSource) -> Option<Extent> {
        self.source = source;
        // `holes_not_used` has reported the reason for `NotUsed`.
        if source != ExtentSource::NotUsed {
            trace::rest_is_data(self.at, &source);
        }
        (self.at < self.end).then(|| self.advance(self.end, ExtentKind::Data))
    }

    fn advance(&mut self, end: u64, kind: ExtentKind) -> Extent {
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
        // Restores a position that was valid before: the call fails only if the descriptor was
        // closed elsewhere.
        let _ = lseek(self.file.borrow(), self.position, Whence::SeekSet);
    }
}
