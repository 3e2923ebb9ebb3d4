//! What RAM is filled from: a chain, or any other reader.

use std::io;
use std::ops::Range;
use std::sync::Arc;

#[cfg(doc)]
use guest_ram::RamOwner;
use guest_ram::dirty_bitmap::ParentImage;
use memory_image::{Chain, ImageId, SegmentSource, VerifiedChain};
use page_reader::{HostMemory, PageReader, PopulatedRanges, RamLayout};

/// A source that RAM is filled from while the guest runs: a [`Chain`], or any other reader.
///
/// Only [`ram_size`](Self::ram_size) is required. [`SizedReader`] adds a size to a reader of
/// another crate. `Box` and `Arc` of a source are sources.
///
/// # Contract
/// - The bytes stay the same until filling has completed, and the ranges that
///   [`populated`](PageReader::populated) omits are zeros.
/// - Several threads read at the same time: the page fault handler, the prefetcher, and callers of
///   [`LazyRam::wait`](crate::LazyRam::wait). A read may take as long as it needs: the access that
///   waits for the page, [dropping](crate::LazyRam#slow-sources) the RAM, and a thread that
///   discards pages wait for it.
/// - A read must not access the memory that is being filled. It would wait for itself.
///
/// # Examples
/// Pages that a server sends:
/// ```
/// use std::io;
///
/// use lazy_restore::{LazyRam, RamSource};
/// use page_reader::PageReader;
/// # if !test_machine::Need::Userfaultfd.met("the example of RamSource") { return Ok(()); }
///
/// struct PageServer {/* connections */}
///
/// impl PageReader for PageServer {
///     fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
///         buf.fill(offset as u8 + 7); // request the bytes, and wait for them
///         Ok(())
///     }
/// }
///
/// impl RamSource for PageServer {
///     fn ram_size(&self) -> u64 {
///         1 << 20
///     }
/// }
///
/// let ram = LazyRam::options().start(PageServer {})?;
/// let mut byte = [0];
/// ram.read_at(70_000, &mut byte)?;
/// assert_eq!(byte, [7]);
/// ram.wait()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a source that RAM can be filled from",
    label = "this type does not implement `RamSource`",
    note = "for a reader of another crate, pass `SizedReader::new(reader, ram_size)`",
    note = "for a reader of your own, implement `RamSource`: only `ram_size` is required"
)]
pub trait RamSource: PageReader + Send + Sync {
    /// Returns the size of the RAM in bytes. It never changes.
    fn ram_size(&self) -> u64;

    /// Returns the image whose state the bytes are. It becomes the parent of the next diff of the
    /// RAM: see [`RamOwner::image`]. The default is [`ParentImage::Unknown`].
    fn image(&self) -> ParentImage {
        ParentImage::Unknown
    }

    /// Returns the part of `within` around the byte at `offset` that one read fetches at a good
    /// price, and whether it is known to be zeros.
    ///
    /// All of it is filled when the page at `offset` is touched. `within` contains `offset`, is
    /// inside of the RAM, and has at most the bytes of
    /// [`LazyRamOptions::fault_around`](crate::LazyRamOptions::fault_around). The result contains
    /// `offset` too; what exceeds `within` is ignored. The borders need not be page borders: pages
    /// that are not entirely inside are read alone.
    ///
    /// The provided method returns the range from [`populated`](PageReader::populated) that
    /// contains the byte, or the gap between two such ranges, which are zeros.
    fn segment(&self, offset: u64, within: Range<u64>) -> RamSegment {
        let Range { mut start, end } = within;
        for stored in self.populated(start..end) {
            if offset < stored.start {
                return RamSegment::zeros(start..stored.start);
            }
            if offset < stored.end {
                return RamSegment::stored(stored);
            }
            start = start.max(stored.end);
        }
        RamSegment::zeros(start..end)
    }

    /// Announces that the bytes of `range` are read soon, so that the source can begin to fetch
    /// them. It returns at once. The range may be partly outside of the RAM.
    ///
    /// The prefetcher announces several ranges before it reads the first of them. The provided
    /// method does nothing.
    fn read_ahead(&self, range: Range<u64>) {
        let _ = range;
    }

    /// Fails if the source does not have all of the RAM. It is called once, before filling starts.
    /// The provided method succeeds.
    ///
    /// # Errors
    /// Returns an error that names what is missing.
    fn check_complete(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A range of the RAM that is read at once, or is known to be zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamSegment {
    /// Offsets in the guest's RAM, in bytes.
    pub range: Range<u64>,
    /// Whether all bytes are known to be zeros. They are not read then.
    pub zeros: bool,
}

impl RamSegment {
    /// Returns a range that is read.
    #[must_use]
    pub fn stored(range: Range<u64>) -> Self {
        Self {
            range,
            zeros: false,
        }
    }

    /// Returns a range of zeros.
    #[must_use]
    pub fn zeros(range: Range<u64>) -> Self {
        Self { range, zeros: true }
    }
}

/// A segment of a chain is contiguous in the file of one image, or all zeros.
impl RamSource for Chain {
    fn ram_size(&self) -> u64 {
        Chain::ram_size(self)
    }

    fn image(&self) -> ParentImage {
        ParentImage::of_image(self.id().map(ImageId::to_bytes))
    }

    fn segment(&self, offset: u64, within: Range<u64>) -> RamSegment {
        let mut segments = self.segments(within);
        let segment = segments.find(|segment| segment.range.contains(&offset));
        match segment {
            // The caller reads the page alone.
            None => RamSegment::stored(offset..offset),
            Some(segment) => RamSegment {
                zeros: !matches!(segment.source, SegmentSource::Stored { .. }),
                range: segment.range,
            },
        }
    }

    fn read_ahead(&self, range: Range<u64>) {
        Chain::read_ahead(self, range);
    }

    fn check_complete(&self) -> io::Result<()> {
        self.check_full().map_err(io::Error::other)
    }
}

/// The segments are those of the chain.
impl RamSource for VerifiedChain {
    fn ram_size(&self) -> u64 {
        self.chain().ram_size()
    }

    fn image(&self) -> ParentImage {
        self.chain().image()
    }

    fn segment(&self, offset: u64, within: Range<u64>) -> RamSegment {
        self.chain().segment(offset, within)
    }

    fn read_ahead(&self, range: Range<u64>) {
        self.chain().read_ahead(range);
    }

    fn check_complete(&self) -> io::Result<()> {
        self.chain().check_complete()
    }
}

macro_rules! forward_to_pointee {
    ($($pointer:ty),*) => {$(
        impl<S: RamSource + ?Sized> RamSource for $pointer {
            fn ram_size(&self) -> u64 {
                (**self).ram_size()
            }

            fn image(&self) -> ParentImage {
                (**self).image()
            }

            fn segment(&self, offset: u64, within: Range<u64>) -> RamSegment {
                (**self).segment(offset, within)
            }

            fn read_ahead(&self, range: Range<u64>) {
                (**self).read_ahead(range);
            }

            fn check_complete(&self) -> io::Result<()> {
                (**self).check_complete()
            }
        }
    )*};
}

forward_to_pointee!(Box<S>, Arc<S>);

/// A reader of another crate, with the size of the RAM, as a [`RamSource`].
///
/// The reader provides the bytes of the RAM, not those of an image file. Offset 0 of a packed image
/// is its header, which would become RAM, and a sealed image has a footer after the RAM. The bytes
/// are not examined, because a guest controls those of raw RAM. For the bytes of an image, pass a
/// [`Chain`](memory_image::Chain) of [`Image::from_reader`](memory_image::Image::from_reader) or
/// [`Image::from_file`](memory_image::Image::from_file), which is a source of its own.
///
/// # Examples
/// ```
/// use lazy_restore::{LazyRam, SizedReader};
/// use page_reader::PageReader;
/// # if !test_machine::Need::Userfaultfd.met("the example of SizedReader") { return Ok(()); }
///
/// let image = vec![7; 1 << 20]; // for example, received from another host
/// let ram_size = image.len() as u64;
/// let ram = LazyRam::options().start(SizedReader::new(image, ram_size))?;
/// let mut byte = [0];
/// ram.read_at(70_000, &mut byte)?;
/// assert_eq!(byte, [7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct SizedReader<R> {
    reader: R,
    ram_size: u64,
}

impl<R: PageReader> SizedReader<R> {
    /// Returns the first `ram_size` bytes of `reader`.
    ///
    /// The actual size of the reader is not checked: bytes that it lacks cannot be filled.
    #[must_use]
    pub fn new(reader: R, ram_size: u64) -> Self {
        Self { reader, ram_size }
    }
}

impl<R: PageReader> PageReader for SizedReader<R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        end.filter(|end| *end <= self.ram_size)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        self.reader.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let left = self.ram_size.checked_sub(offset)?;
        let len = len.min(usize::try_from(left).unwrap_or(usize::MAX));
        self.reader.host_memory(offset, len)
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        self.reader.populated(range)
    }

    fn check_source(&self) -> io::Result<()> {
        self.reader.check_source()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        let layout = self.reader.ram_layout();
        layout.filter(|layout| layout.ram_size() == self.ram_size)
    }

    fn known_size(&self) -> Option<u64> {
        Some(self.ram_size)
    }
}

impl<R: PageReader + Send + Sync> RamSource for SizedReader<R> {
    fn ram_size(&self) -> u64 {
        self.ram_size
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// RAM of 100 bytes, of which two ranges are populated.
    struct TwoRanges;

    impl PageReader for TwoRanges {
        fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
            buf.fill(7);
            Ok(())
        }

        fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
            let parts = [10..20, 40..60]
                .map(|part: Range<u64>| part.start.max(range.start)..part.end.min(range.end));
            Box::new(parts.into_iter().filter(|part| !part.is_empty()))
        }
    }

    #[rstest]
    #[case::before_the_first(5, RamSegment::zeros(0..10))]
    #[case::first_byte(10, RamSegment::stored(10..20))]
    #[case::last_byte(19, RamSegment::stored(10..20))]
    #[case::between(20, RamSegment::zeros(20..40))]
    #[case::clipped(49, RamSegment::stored(40..50))]
    fn provided_segments_are_those_of_populated(#[case] at: u64, #[case] expected: RamSegment) {
        let source = SizedReader::new(TwoRanges, 100);
        assert_eq!(source.segment(at, 0..50), expected);
        assert_eq!(Box::new(source).segment(at, 0..50), expected);
    }

    #[test]
    fn gap_after_the_last_populated_range_is_zeros() {
        let source = SizedReader::new(TwoRanges, 100);
        assert_eq!(source.segment(80, 50..100), RamSegment::zeros(60..100));
    }

    #[test]
    fn reading_past_the_stated_size_fails() {
        let source = SizedReader::new(TwoRanges, 100);
        source.read_at(90, &mut [0; 10]).unwrap();
        let error = source.read_at(90, &mut [0; 11]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let source = SizedReader::new(vec![7; 200], 100);
        assert_eq!(source.host_memory(90, 50).unwrap().len(), 10);
        assert!(source.host_memory(101, 50).is_none());
    }

    #[test]
    fn layout_of_another_size_is_not_stated() {
        struct Reader(RamLayout);

        impl PageReader for Reader {
            fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
                Ok(())
            }

            fn ram_layout(&self) -> Option<&RamLayout> {
                Some(&self.0)
            }
        }

        let reader = || Reader(RamLayout::single(1 << 30, 8192).unwrap());
        let layout = reader().0;
        assert_eq!(SizedReader::new(reader(), 8192).ram_layout(), Some(&layout));
        assert_eq!(SizedReader::new(reader(), 4096).ram_layout(), None);
    }
}
