//! A chain whose bytes are compared with their checksums before they are handed out.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use image_format::{CHUNK_SIZE, ChunkSum, Footer, Storage};
use page_reader::{PageReader, PopulatedRanges, RamLayout, SecretBuffer};

use crate::chain::Chain;
use crate::chain::segment::{Segment, SegmentSource};
use crate::damage::Damage;
use crate::error::ReadImageError;
use crate::image::Image;

/// A [`Chain`] that verifies a chunk of a sealed or packed image before it returns a byte of it.
///
/// A chunk of 1 MiB has one checksum. The first read of any of its bytes reads all of it, compares
/// it with the checksum, and returns the bytes that were compared. Later reads of the chunk read
/// the requested bytes alone. The bytes of raw images have no checksums and are returned as they
/// are.
///
/// A chunk that does not match its checksum is never returned: every read of it fails with
/// [`ReadImageError::Damaged`]. A chunk that has matched is not verified again, also if the kernel
/// reads it from the disk again. Call [`check_unchanged`](Chain::check_unchanged) after the last
/// read, as for the chain.
///
/// Clones of the `Arc` of one value share which chunks are verified. Memory: 9 bytes for each chunk
/// with a checksum, and 1 MiB for each thread that verifies at the same time.
///
/// # Examples
/// ```
/// use memory_image::{Chain, VerifiedChain};
/// use page_reader::PageReader;
/// # use memory_writer::{Layout, MemoryWriter};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("full.mem");
/// # let options = MemoryWriter::options().layout(Layout::Packed);
/// # let mut writer = options.open(&path, 1 << 20, 4096)?;
/// # writer.write_full(&vec![1; 1 << 20])?;
/// # writer.commit()?;
///
/// let chain = VerifiedChain::new(Chain::open_sealed(&[&path])?);
/// let mut page = [0; 4096];
/// chain.read_at(8192, &mut page)?; // fails if any page of the chunk is damaged
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct VerifiedChain {
    chain: Arc<Chain>,
    /// Those of each image, the base first.
    layers: Vec<LayerChunks>,
    /// Buffers of 1 MiB that no thread uses.
    buffers: Mutex<Vec<SecretBuffer>>,
}

/// The chunks of an image that have checksums, in the order of the checksums.
#[derive(Debug, Default)]
struct LayerChunks {
    numbers: Vec<u64>,
    states: Vec<AtomicU8>,
}

const UNKNOWN: u8 = 0;
const VERIFIED: u8 = 1;
const DAMAGED: u8 = 2;

impl LayerChunks {
    fn of(image: &Image) -> Self {
        let chunks = image.footer().into_iter().flat_map(Footer::chunks);
        let numbers: Vec<_> = chunks.map(|chunk| chunk.number).collect();
        let states = numbers.iter().map(|_| AtomicU8::new(UNKNOWN)).collect();
        Self { numbers, states }
    }
}

impl VerifiedChain {
    /// Creates a reader of the chain, none of whose chunks is verified yet.
    #[must_use]
    pub fn new(chain: impl Into<Arc<Chain>>) -> Self {
        let chain = chain.into();
        Self {
            layers: chain.images().map(LayerChunks::of).collect(),
            buffers: Mutex::default(),
            chain,
        }
    }

    /// Returns the chain.
    #[must_use]
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Reads the bytes from `offset` on into `buf`, as [`Chain::read`] does, and verifies them.
    ///
    /// # Errors
    /// Returns [`ReadImageError::Damaged`], and the errors of [`Chain::read`].
    ///
    /// # Panics
    /// Panics if the range is not inside the RAM.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadImageError> {
        let end = offset.checked_add(buf.len() as u64);
        let end = end.filter(|end| *end <= self.chain.ram_size());
        let end = end.expect("the range is inside the RAM");
        let mut rest = buf;
        for Segment { range, source } in self.chain.segments(offset..end) {
            let (piece, later) = rest.split_at_mut((range.end - range.start) as usize);
            match source {
                SegmentSource::Stored { layer, offset } => {
                    self.read_stored(layer, range, offset, piece)?;
                }
                SegmentSource::Hole | SegmentSource::Zero => self.chain.read(range.start, piece)?,
            }
            rest = later;
        }
        Ok(())
    }

    /// Reads bytes that an image stores at an offset of its file, chunk by chunk.
    fn read_stored(
        &self,
        layer: usize,
        range: Range<u64>,
        file_offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ReadImageError> {
        let image = self.chain.image(layer);
        let Some(footer) = image.footer() else {
            return image.read_file(file_offset, buf);
        };
        let (mut at, mut rest) = (range.start, buf);
        while at < range.end {
            let end = range.end.min((at / CHUNK_SIZE + 1) * CHUNK_SIZE);
            let (piece, later) = rest.split_at_mut((end - at) as usize);
            let chunk = Chunk {
                image,
                footer,
                number: at / CHUNK_SIZE,
            };
            let from = file_offset + (at - range.start);
            self.read_chunk(&self.layers[layer], &chunk, at..end, from, piece)?;
            (at, rest) = (end, later);
        }
        Ok(())
    }

    fn read_chunk(
        &self,
        chunks: &LayerChunks,
        chunk: &Chunk<'_>,
        range: Range<u64>,
        file_offset: u64,
        piece: &mut [u8],
    ) -> Result<(), ReadImageError> {
        // A stored byte without a checksum contradicts the footer, which was validated.
        let Ok(index) = chunks.numbers.binary_search(&chunk.number) else {
            return Err(chunk.damaged());
        };
        let state = &chunks.states[index];
        match state.load(Ordering::Acquire) {
            VERIFIED => chunk.image.read_file(file_offset, piece),
            DAMAGED => Err(chunk.damaged()),
            _ => {
                let mut buffer = self.buffers().pop().unwrap_or_default();
                let verified = chunk.verify(index, &mut buffer, range, piece);
                self.buffers().push(buffer);
                match &verified {
                    Ok(()) => state.store(VERIFIED, Ordering::Release),
                    Err(ReadImageError::Damaged { .. }) => state.store(DAMAGED, Ordering::Release),
                    // It may be possible to read it later.
                    Err(_) => {}
                }
                verified
            }
        }
    }

    fn buffers(&self) -> std::sync::MutexGuard<'_, Vec<SecretBuffer>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A chunk of an image with checksums.
struct Chunk<'c> {
    image: &'c Image,
    footer: &'c Footer,
    number: u64,
}

impl Chunk<'_> {
    /// Returns the stored bytes of the chunk: their guest offsets, and their offset in the file.
    fn pieces(&self) -> impl Iterator<Item = (Range<u64>, u64)> {
        let start = self.number * CHUNK_SIZE;
        let end = start + CHUNK_SIZE;
        let runs = &self.footer.runs;
        let first = runs.partition_point(|run| run.range().end <= start);
        let runs = runs[first..].iter().take_while(move |run| run.start < end);
        let stored = runs.filter(|run| run.stored != Storage::Zeros);
        stored.filter_map(move |run| {
            let piece = run.start.max(start)..run.range().end.min(end);
            Some((piece.clone(), run.stored_at(piece.start)?))
        })
    }

    /// Reads all of the chunk into `buffer`, compares it with the checksum at `index`, and copies
    /// the bytes of `wanted` to `out`.
    fn verify(
        &self,
        index: usize,
        buffer: &mut SecretBuffer,
        wanted: Range<u64>,
        out: &mut [u8],
    ) -> Result<(), ReadImageError> {
        let mut sum = ChunkSum::new();
        let mut copied = 0;
        for (piece, offset) in self.pieces() {
            // Inside a chunk, so at most 1 MiB.
            let stored = buffer.sized((piece.end - piece.start) as usize);
            self.image.read_file(offset, stored)?;
            sum.update(stored);
            let part = wanted.start.max(piece.start)..wanted.end.min(piece.end);
            if !part.is_empty() {
                let from = (part.start - piece.start) as usize..(part.end - piece.start) as usize;
                let to = (part.start - wanted.start) as usize..(part.end - wanted.start) as usize;
                copied += to.len();
                out[to].copy_from_slice(&stored[from]);
            }
        }
        let matches = self.footer.checksums.get(index) == Some(&sum.finish());
        if matches && copied == out.len() {
            return Ok(());
        }
        out.fill(0);
        Err(self.damaged())
    }

    fn damaged(&self) -> ReadImageError {
        let start = self.number * CHUNK_SIZE;
        let offset = self.pieces().next().map_or(0, |(_, offset)| offset);
        let guest = start..self.footer.ram_size.min(start + CHUNK_SIZE);
        ReadImageError::Damaged {
            path: self.image.path().to_owned(),
            damage: Damage::Chunk {
                number: self.number,
                guest,
                offset,
            },
        }
    }
}

/// Reads the guest's RAM as [`Chain`] does, and verifies it.
impl PageReader for VerifiedChain {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        end.filter(|end| *end <= self.chain.ram_size())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        self.read(offset, buf).map_err(|error| match error {
            ReadImageError::Read { ref source, .. } => io::Error::new(source.kind(), error),
            other => io::Error::other(other),
        })
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        self.chain.populated(range)
    }

    fn check_source(&self) -> io::Result<()> {
        self.chain.check_source()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.chain.ram_layout()
    }

    fn known_size(&self) -> Option<u64> {
        self.chain.known_size()
    }
}
