//! A guest's RAM in one region, which every contender reads.

use std::io;

use page_reader::GuestMemoryReader;
use random::Random;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub struct Ram {
    pub memory: GuestMemoryMmap,
    pub size: u64,
}

/// The contents of the pages of 4 KiB.
#[derive(Clone, Copy, Debug)]
pub enum Content {
    Random,
    /// This many of 100 pages are written zeros; the others are random.
    Zero(u64),
    /// This many of 100 pages were never touched; the others are random.
    Untouched(u64),
}

const PAGE: u64 = 4096;

impl Ram {
    pub fn new(size: u64, content: Content) -> Self {
        let range = (GuestAddress(0), usize::try_from(size).unwrap());
        let memory = GuestMemoryMmap::from_ranges(&[range]).unwrap();
        let mut random = Random::seeded(1);
        let mut page = vec![0; PAGE as usize];
        let zeros = vec![0; PAGE as usize];
        for at in (0..size).step_by(PAGE as usize) {
            // Zeros come in runs of 64 pages. A guest touches one huge page at a time, so untouched
            // pages come in runs of that size.
            let (share, stretch, touch) = match content {
                Content::Random => (0, 1, true),
                Content::Zero(share) => (share, 64, true),
                Content::Untouched(share) => (share, 512, false),
            };
            let empty = Random::seeded(at / PAGE / stretch).number() % 100 < share;
            if !empty {
                for word in page.chunks_exact_mut(8) {
                    word.copy_from_slice(&random.number().to_ne_bytes());
                }
                memory.write_slice(&page, GuestAddress(at)).unwrap();
            } else if touch {
                memory.write_slice(&zeros, GuestAddress(at)).unwrap();
            }
        }
        Self { memory, size }
    }

    pub fn reader(&self) -> GuestMemoryReader<&GuestMemoryMmap> {
        GuestMemoryReader::new(&self.memory).unwrap()
    }
}

/// Reads the same RAM for squib-snapshot.
impl squib_snapshot::PageReader for Ram {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let read = self.memory.read_slice(buf, GuestAddress(offset));
        read.map_err(io::Error::other)
    }
}
