//! A chain as guest memory, without merging or reading it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::ops::Range;

use page_reader::{HostMemory, PageReader, SecretBuffer};

use super::data::FileData;
use super::{Region, host_page};
use crate::chain::Chain;
use crate::chain::segments::{Segment, Source};
use crate::error::ImageError;
use crate::restore::{CHUNK, HostRam, RamTarget};

/// A chain mapped copy-on-write (`MAP_PRIVATE`) as one range of host memory: RAM for a guest that starts at once and reads its pages
/// when it touches them. What the guest writes stays its own; the bytes of the files never change.
///
/// No hole of a diff is mapped, so a raw diff keeps its holes, which say what was clean. On tmpfs, a page that is touched where the full
/// base has a hole is allocated in the base's file, which then takes more memory and has fewer holes, of the same bytes.
///
/// The longest runs of pages are mapped, each from its own image, and short ones copied when the chain is mapped: a process has no
/// more than so many mappings (`vm.max_map_count`, 65,530 by default on Linux). What is under them in older images is mapped as if they weren't there,
/// unless it is a hole of a diff, so a base takes one mapping. Each run takes some 10 us, mapped or copied; this suits a chain whose diffs are clustered,
/// or few. Meanwhile 48 bytes are taken for each run that is copied, and 16 for each run of data in a diff's file. Where a chain is scattered, [`copied`](Self::copied) shows it, and on Linux `LazyRam` starts as fast as ever.
///
/// The files must not be cut short while they are mapped: touching a page that is gone is a `SIGBUS`. Replacing one by a
/// commit is no harm, because the mapping keeps the old file. The chain itself isn't needed any more, and no descriptor is: a chain may
/// have any number of images.
///
/// # Examples
/// ```
/// use memory_image::{Chain, MappedChain};
/// use page_reader::PageReader;
/// # let dir = tempfile::tempdir()?;
/// # let (full, diff) = (dir.path().join("full.mem"), dir.path().join("diff.mem"));
/// # std::fs::write(&full, vec![7; 1 << 20])?;
/// # std::fs::write(&diff, vec![8; 1 << 20])?;
///
/// let mut chain = Chain::open_raw(&full, 4096)?;
/// chain.push_pages(&diff, [65536..131072])?;
/// let ram = MappedChain::open(&chain)?;
/// println!("a guest of {} bytes at {:p}, {} of them copied", ram.len(), ram.as_ptr(), ram.copied());
/// let mut bytes = [0; 2];
/// ram.read_at(65535, &mut bytes)?; // what a running guest has there now
/// assert_eq!(bytes, [7, 8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MappedChain {
    ram: Region,
    mapped: u64,
    copied: u64,
}

/// How a chain is mapped: [`MappedChain::options`].
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `map`"]
pub struct MappedChainOptions {
    max_mappings: usize,
}

impl MappedChain {
    /// Maps the chain, readable and writable.
    ///
    /// # Errors
    /// See [`MappedChainOptions::map`].
    pub fn open(chain: &Chain) -> Result<Self, ImageError> {
        Self::options().map(chain)
    }

    /// Says how a chain is to be mapped.
    pub fn options() -> MappedChainOptions {
        MappedChainOptions {
            max_mappings: 16_384,
        }
    }

    /// The address of the first byte, aligned to the host's page. Valid for reads and writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ram.as_ptr()
    }

    /// The size of the RAM in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.ram.len()
    }

    /// How many bytes of the RAM were mapped from the images' files.
    #[must_use]
    pub fn mapped(&self) -> u64 {
        self.mapped
    }

    /// How many bytes of the RAM were copied. What was neither mapped nor copied is zeros.
    #[must_use]
    pub fn copied(&self) -> u64 {
        self.copied
    }
}

impl MappedChainOptions {
    /// The most mappings that the RAM may take of those the process can have; 16,384 if not given. With 1 everything is copied.
    pub fn max_mappings(mut self, mappings: usize) -> Self {
        self.max_mappings = mappings;
        self
    }

    /// Maps the chain, readable and writable.
    ///
    /// # Errors
    /// [`ImageError::NotFull`] for a chain of diffs; [`ImageError::Reserve`] where there is no address space for the RAM;
    /// [`ImageError::TooManyMappings`] where the process has fewer mappings left than it may take; [`ImageError::Map`], also for an image that was cut short
    /// since it was opened; [`ImageError::Replaced`]; [`ImageError::Read`] for what is copied.
    pub fn map(&self, chain: &Chain) -> Result<MappedChain, ImageError> {
        chain.check_full()?;
        let (size, page) = (chain.size(), host_page());
        let ram = Region::zeros(size).map_err(|source| ImageError::Reserve { size, source })?;
        let plan = Plan::new(chain, page, self.max_mappings)?;
        let mut ram = plan.map_over(ram, chain, page)?;

        let (stored, copies) = plan.copies(chain, page);
        let copied = copies.iter().map(|copy| len(&copy.range)).sum();
        // A copy over mapped pages has the kernel read these first: at least not their neighbours too.
        let advised = |advised: io::Result<()>| {
            advised.map_err(|source| ImageError::Reserve { size, source })
        };
        advised(ram.read_single_pages(true))?;
        copy(chain, copies, &mut ram.as_target(size))?;
        advised(ram.read_single_pages(false))?;
        Ok(MappedChain {
            ram,
            mapped: stored - copied,
            copied,
        })
    }
}

/// The RAM as the guest has it now: the images, and what was written since.
impl PageReader for MappedChain {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.ram.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.ram.host_memory(offset, len)
    }
}

/// Segments of one layer that one mapping shows, as they have the same distance to each other in the RAM and in the file. Between them is nothing
/// but pages of newer layers, which come over it; and in a base that is not packed, zeros, which its file has in their place.
///
/// All of it is data in the file of a diff: a page that is copied over a mapping reads the file's page under it first.
///
/// Ordered by what mapping it saves from being copied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    own: u64,
    layer: usize,
    start: u64,
    end: u64,
    /// Where `start` is in the layer's file.
    offset: u64,
}

impl Span {
    /// The part of it in whole pages of the host; empty where the file has the bytes at other places of a page.
    fn whole_pages(&self, page: u64) -> Range<u64> {
        let start = self.start.next_multiple_of(page);
        let end = self.end - self.end % page;
        let aligned = self.start % page == self.offset % page;
        start..if aligned { end.max(start) } else { start }
    }
}

/// Bytes of a layer's file that no mapping shows.
struct Copy {
    layer: usize,
    offset: u64,
    range: Range<u64>,
}

/// Copies in the order of the files, each of which is opened once, however many can be open at a time.
fn copy(chain: &Chain, mut copies: Vec<Copy>, ram: &mut HostRam<'_>) -> Result<(), ImageError> {
    copies.sort_unstable_by_key(|copy| (copy.layer, copy.offset));
    let mut buffer = SecretBuffer::new();
    for Copy {
        layer,
        offset,
        range,
    } in copies
    {
        for at in range.clone().step_by(CHUNK as usize) {
            let bytes = buffer.sized(CHUNK.min(range.end - at) as usize);
            let image = chain.image(layer);
            image.read_file(offset + (at - range.start), bytes)?;
            let copied = ram.write_at(at, bytes);
            copied.map_err(|source| ImageError::Target { offset: at, source })?;
        }
    }
    Ok(())
}

/// What to map, the oldest layer first.
struct Plan {
    spans: Vec<Span>,
    data: FileData,
}

impl Plan {
    fn new(chain: &Chain, page: u64, max_mappings: usize) -> Result<Self, ImageError> {
        // Each mapping may cut another one in two.
        let most = max_mappings.saturating_sub(1) / 2;
        if most == 0 {
            return Ok(Self {
                spans: Vec::new(),
                data: FileData::all(chain),
            });
        }
        let data = FileData::list(chain)?;
        let mut longest = BinaryHeap::new();
        each_span(chain, &data, |span| {
            if !span.whole_pages(page).is_empty() {
                longest.push(Reverse(span));
                if longest.len() > most {
                    longest.pop();
                }
            }
        });
        let mut spans: Vec<_> = longest.into_iter().map(|Reverse(span)| span).collect();
        spans.sort_unstable_by_key(|span| (span.layer, span.start));
        Ok(Self { spans, data })
    }

    fn map_over(&self, mut ram: Region, chain: &Chain, page: u64) -> Result<Region, ImageError> {
        for span in &self.spans {
            let image = chain.image(span.layer);
            let failed = |source| ImageError::Map {
                path: image.path.clone(),
                source,
            };
            let range = span.whole_pages(page);
            let offset = span.offset + (range.start - span.start);
            let file = image.file()?;
            let file_size = file.metadata().map_err(failed)?.len();
            if file_size < offset + len(&range) {
                let cut = "it was cut short since it was opened";
                return Err(failed(io::Error::new(io::ErrorKind::UnexpectedEof, cut)));
            }
            let mapped = ram.map_over(range, &file, offset);
            ram = mapped.map_err(|source| match source.kind() {
                // The address space is reserved and takes no memory: what is missing is a mapping.
                io::ErrorKind::OutOfMemory => ImageError::TooManyMappings {
                    path: image.path.clone(),
                    source,
                },
                _ => failed(source),
            })?;
        }
        Ok(ram)
    }

    /// Returns how many bytes the images store, and what of it no mapping shows.
    fn copies(&self, chain: &Chain, page: u64) -> (u64, Vec<Copy>) {
        let (mut stored, mut copies) = (0, Vec::new());
        for (Segment { range, source }, _) in self.data.segments(chain) {
            let Source::Stored { layer, offset } = source else {
                continue;
            };
            stored += len(&range);
            let shown = self.shown(layer, &range, page);
            let parts = [range.start..shown.start, shown.end..range.end];
            let parts = parts.into_iter().filter(|part| !part.is_empty());
            copies.extend(parts.map(|part| Copy {
                layer,
                offset: offset + (part.start - range.start),
                range: part,
            }));
        }
        (stored, copies)
    }

    /// Returns what of a layer's segment a mapping shows: all, all but its ends, or nothing at its start.
    fn shown(&self, layer: usize, segment: &Range<u64>, page: u64) -> Range<u64> {
        let Range { start, end } = *segment;
        let after = self
            .spans
            .partition_point(|span| (span.layer, span.start) <= (layer, start));
        let span = self.spans[..after].last();
        let span = span.filter(|span| span.layer == layer && end <= span.end);
        let shown = span.map_or(start..start, |span| span.whole_pages(page));
        shown.start.clamp(start, end)..shown.end.clamp(start, end)
    }
}

/// Calls back for every span of the chain, each as long as it can be.
fn each_span(chain: &Chain, data: &FileData, mut each: impl FnMut(Span)) {
    // Packed pages that follow each other in the RAM may have any other page between them in the file.
    let zeros_are_in_the_base = chain.base().in_place();
    // By layer, ascending: a span ends where an older layer has the bytes.
    let mut open: Vec<Span> = Vec::new();
    for (Segment { range, source }, is_data) in data.segments(chain) {
        let go_on = match source {
            Source::Stored { layer, .. } => layer + 1,
            Source::Hole if zeros_are_in_the_base => 1,
            // Nothing is mapped beneath zeros that its file does not have.
            Source::Hole | Source::Zero => 0,
        };
        while let Some(span) = open.pop_if(|span| span.layer >= go_on) {
            each(span);
        }
        let Source::Stored { layer, offset } = source else {
            continue;
        };
        if !is_data {
            continue;
        }
        let same_layer = |span: &mut Span| span.layer == layer;
        if let Some(mut span) = open.pop_if(same_layer) {
            let in_line = offset.wrapping_sub(span.offset) == range.start - span.start;
            if in_line && data.covers(layer, span.offset + (span.end - span.start)..offset) {
                span.own += len(&range);
                span.end = range.end;
                open.push(span);
                continue;
            }
            each(span);
        }
        open.push(Span {
            own: len(&range),
            layer,
            start: range.start,
            end: range.end,
            offset,
        });
    }
    open.into_iter().for_each(each);
}

fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}
