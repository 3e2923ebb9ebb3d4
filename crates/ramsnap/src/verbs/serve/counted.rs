//! The chain that is served, with the number of bytes that each image has contributed.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lazy_restore::{RamSegment, RamSource};
use memory_image::{Chain, SegmentSource, VerifiedChain};
use page_reader::{PageReader, PopulatedRanges, RamLayout};

/// A chain whose reads are counted by image.
pub struct Counted {
    chain: Arc<Chain>,
    verified: Option<VerifiedChain>,
    bytes: Arc<ImageBytes>,
}

/// The bytes that were read from each image of a chain.
#[derive(Debug)]
pub struct ImageBytes {
    chain: Arc<Chain>,
    bytes: Vec<AtomicU64>,
}

impl ImageBytes {
    /// Returns the path of each image and its bytes, oldest first.
    pub fn all(&self) -> impl Iterator<Item = (&Path, u64)> {
        let bytes = self.bytes.iter().map(|bytes| bytes.load(Ordering::Relaxed));
        self.chain.paths().zip(bytes)
    }
}

impl Counted {
    /// Returns a source that compares the bytes of `chain` with their checksums, or does not.
    pub fn new(chain: Chain, verify: bool) -> Self {
        let chain = Arc::new(chain);
        let bytes = ImageBytes {
            bytes: (0..chain.len()).map(|_| AtomicU64::new(0)).collect(),
            chain: Arc::clone(&chain),
        };
        Self {
            verified: verify.then(|| VerifiedChain::new(Arc::clone(&chain))),
            chain,
            bytes: Arc::new(bytes),
        }
    }

    pub fn bytes(&self) -> Arc<ImageBytes> {
        Arc::clone(&self.bytes)
    }

    fn count(&self, range: Range<u64>) {
        for segment in self.chain.segments(range) {
            if let SegmentSource::Stored { layer, .. } = segment.source {
                let len = segment.range.end - segment.range.start;
                self.bytes.bytes[layer].fetch_add(len, Ordering::Relaxed);
            }
        }
    }
}

impl PageReader for Counted {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match &self.verified {
            Some(verified) => verified.read_at(offset, buf),
            None => self.chain.read_at(offset, buf),
        }?;
        self.count(offset..offset + buf.len() as u64);
        Ok(())
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        self.chain.populated(range)
    }

    fn check_source(&self) -> io::Result<()> {
        match &self.verified {
            Some(verified) => verified.check_source(),
            None => self.chain.check_source(),
        }
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        PageReader::ram_layout(&*self.chain)
    }

    fn known_size(&self) -> Option<u64> {
        self.chain.known_size()
    }
}

impl RamSource for Counted {
    fn ram_size(&self) -> u64 {
        self.chain.ram_size()
    }

    fn segment(&self, offset: u64, within: Range<u64>) -> RamSegment {
        self.chain.segment(offset, within)
    }

    fn read_ahead(&self, range: Range<u64>) {
        self.chain.read_ahead(range);
    }

    fn check_complete(&self) -> io::Result<()> {
        self.chain.check_complete()
    }
}
