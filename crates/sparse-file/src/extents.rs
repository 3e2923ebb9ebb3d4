//! The data and hole ranges of an open file.

use std::fs::File;
use std::io;
use std::iter::FusedIterator;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

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
    /// The file system told holes from data.
    Reported,
    /// The file system called all of the file data: it has no holes, or this file system calls everything data (NFS v3,
    /// exFAT). [`Capabilities::seek_hole`](crate::Capabilities::seek_hole) tells which.
    NoHoleReported,
    /// The file system has no `SEEK_HOLE`: the one data extent is no more than a safe assumption.
    Unsupported,
    /// The rest of the file was called data without asking: the calls allowed by [`Extents::limit_calls`] were used up,
    /// or the file was changing under the scan.
    CutShort,
}

/// Lists the extents of `file` from 0 to its length at the time of this call.
///
/// The ranges cover `[0, len)` without gap or overlap, neighbours differ in kind, and what can't be known is data. It
/// costs one `lseek(2)` an extent. A file that grows meanwhile is listed up to its old length; what a shrinking one
/// loses is listed as a hole. Where other code changes the file, the listing is only a hint.
///
/// The *file position* moves and is put back when the iterator drops, so don't `read` or `seek` through this
/// descriptor meanwhile; positioned I/O (`read_at`, `pwrite`) is free to go on.
///
/// On macOS the file is first handed to the file system by `fsync(2)`: there `SEEK_HOLE` may overlook what is
/// only in the page cache.
///
/// # Errors
/// Those of `fstat(2)` and `lseek(2)`: `ESPIPE` for what is no file.
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
pub fn extents(file: &File) -> io::Result<Extents<'_>> {
    let len = file.metadata()?.len();
    let position = lseek(file, 0, Whence::SeekCur)?;
    if cfg!(target_os = "macos") {
        nix::unistd::fsync(file)?;
    }
    let mut extents = Extents {
        file,
        len,
        at: 0,
        kind: Kind::Data,
        knowledge: Knowledge::Reported,
        calls_left: u64::MAX,
        ahead: None,
        position,
    };
    // The first boundary is looked up here, so that `knowledge` has an answer before the first extent is taken.
    extents.ahead = match extents.seek(Whence::SeekHole) {
        Err(error) if is_unsupported(&error) => {
            Some(Ok(extents.rest_is_data(Knowledge::Unsupported)))
        }
        Ok(hole) if hole >= len && len > 0 => {
            Some(Ok(extents.rest_is_data(Knowledge::NoHoleReported)))
        }
        found => extents.step(found).transpose(),
    };
    Ok(extents)
}

/// The extents of a file in ascending order: see [`extents`].
#[derive(Debug)]
pub struct Extents<'f> {
    file: &'f File,
    len: u64,
    /// Everything below has been found.
    at: u64,
    /// What is believed to stand at `at`.
    kind: Kind,
    knowledge: Knowledge,
    calls_left: u64,
    /// Found, but not yet known to end there: its neighbour may be of the same kind.
    ahead: Option<io::Result<Extent>>,
    position: libc::off_t,
}

impl Extents<'_> {
    /// What the listing rests on, so far: [`Knowledge::CutShort`] may still come.
    #[must_use]
    pub fn knowledge(&self) -> Knowledge {
        self.knowledge
    }

    /// Whether the file system itself told holes from data. Where not, "data" means no more than "perhaps data".
    #[must_use]
    pub fn are_exact(&self) -> bool {
        self.knowledge == Knowledge::Reported
    }

    /// Allows `calls` more calls of `lseek(2)`; when they are used up, the rest of the file is called data and
    /// [`knowledge`](Self::knowledge) says [`Knowledge::CutShort`].
    ///
    /// For file systems where such a call is slow and the caller would rather read data than look for holes.
    #[must_use]
    pub fn limit_calls(mut self, calls: u64) -> Self {
        self.calls_left = calls;
        self
    }

    fn seek(&mut self, whence: Whence) -> io::Result<u64> {
        self.calls_left = self.calls_left.saturating_sub(1);
        let at = libc::off_t::try_from(self.at).map_err(io::Error::other)?;
        match lseek(self.file, at, whence) {
            Ok(found) => u64::try_from(found).map_err(io::Error::other),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next range as the file system gives it; may be of the same kind as the one before.
    fn find(&mut self) -> io::Result<Option<Extent>> {
        // A boundary where one was just found means that the file changes under us. Believe it once.
        for _ in 0..2 {
            if self.at >= self.len {
                return Ok(None);
            }
            if self.calls_left == 0 {
                break;
            }
            let found = self.seek(match self.kind {
                Kind::Data => Whence::SeekHole,
                Kind::Hole => Whence::SeekData,
            });
            if let Some(extent) = self.step(found)? {
                return Ok(Some(extent));
            }
        }
        Ok(Some(self.rest_is_data(Knowledge::CutShort)))
    }

    /// Goes to the boundary that was `found`, where there the kind changes. `None` if that is no step forward.
    fn step(&mut self, found: io::Result<u64>) -> io::Result<Option<Extent>> {
        let (kind, end) = match found {
            Ok(end) => (self.kind, end.min(self.len)),
            // No data from here on; or the file ends before here, and what is past its end is no data either.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => (Kind::Hole, self.len),
            Err(error) => return Err(error),
        };
        self.kind = match kind {
            Kind::Data => Kind::Hole,
            Kind::Hole => Kind::Data,
        };
        Ok((end > self.at).then(|| self.advance(end, kind)))
    }

    fn rest_is_data(&mut self, knowledge: Knowledge) -> Extent {
        self.knowledge = knowledge;
        self.advance(self.len, Kind::Data)
    }

    fn advance(&mut self, end: u64, kind: Kind) -> Extent {
        let range = self.at..end;
        self.at = end;
        Extent { range, kind }
    }
}

impl Iterator for Extents<'_> {
    type Item = io::Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.ahead.take().or_else(|| self.find().transpose())?;
        let mut extent = match first {
            Ok(extent) => extent,
            Err(error) => {
                self.at = self.len;
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

impl FusedIterator for Extents<'_> {}

impl Drop for Extents<'_> {
    fn drop(&mut self) {
        // It was the position a moment ago, so the call can't fail but by another's doing.
        let _ = lseek(self.file, self.position, Whence::SeekSet);
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
