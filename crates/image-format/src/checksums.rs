//! Checksums of the RAM's chunks, computed while their bytes pass by.

use std::collections::BTreeMap;
use std::ops::Range;

use bitvec::BitArr;
use bitvec::array::BitArray;

/// The bytes of RAM that one checksum stands for: 1 MiB, from a multiple of it on. What of them is present in the image counts, in ascending
/// order.
///
/// Of a guest of 1 TiB the sums are 32 MiB, as much as a bit for each page of 4 KiB.
pub const CHUNK_SIZE: u64 = 1 << 20;

/// A BLAKE3 hash.
pub type Checksum = [u8; 32];

/// The checksum of one chunk, from its present bytes in ascending order.
#[derive(Clone, Debug, Default)]
pub struct ChunkSum(blake3::Hasher);

impl ChunkSum {
    /// Of no bytes so far.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `bytes` follow.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The sum of all bytes.
    #[must_use]
    pub fn finish(&self) -> Checksum {
        self.0.finalize().into()
    }
}

/// The checksums of an image that is being written.
///
/// Fed in ascending order, as a dump goes, it is done when the dump is. Where bytes come late or a second time (a page written again,
/// a page beside one that was), their chunk's sum can't be had from what passed by: the chunk is [stale](Self::stale), and to be
/// [replaced](Self::replace) by the sum of what is in the file.
///
/// Memory: 32 bytes a chunk that bytes are present of, in blocks of 512; as much again in [`finish`](Self::finish). The size of the RAM takes none.
#[derive(Clone, Debug)]
pub struct Checksums {
    chunks: u64,
    /// By the number of the first chunk of each.
    blocks: BTreeMap<u64, Block>,
    current: Option<Current>,
}

/// The sums of chunks beside each other, some of which have present bytes.
#[derive(Clone, Debug)]
struct Block {
    sums: Vec<Checksum>,
    /// Chunks with present bytes.
    present: BitArr!(for BLOCK, in u64),
    stale: BitArr!(for BLOCK, in u64),
}

/// Chunks of a block.
const BLOCK: usize = 512;

impl Block {
    fn new() -> Self {
        Self {
            sums: vec![[0; 32]; BLOCK],
            present: BitArray::ZERO,
            stale: BitArray::ZERO,
        }
    }
}

#[derive(Clone, Debug)]
struct Current {
    chunk: u64,
    /// The guest offset from which on bytes may follow.
    next: u64,
    sum: ChunkSum,
}

impl Checksums {
    /// For RAM of `ram_size` bytes, of which none is present yet.
    #[must_use]
    pub fn new(ram_size: u64) -> Self {
        Self {
            chunks: ram_size.div_ceil(CHUNK_SIZE),
            blocks: BTreeMap::new(),
            current: None,
        }
    }

    /// The block of a chunk, and its place there.
    fn block(&mut self, chunk: u64) -> (&mut Block, usize) {
        assert!(chunk < self.chunks, "chunk {chunk} of {}", self.chunks);
        let within = chunk % BLOCK as u64;
        let block = self.blocks.entry(chunk - within);
        (block.or_insert_with(Block::new), within as usize)
    }

    /// The bytes from the guest offset `offset` on are `bytes`, from now on.
    ///
    /// # Panics
    /// Panics where they reach past the last chunk.
    pub fn feed(&mut self, offset: u64, bytes: &[u8]) {
        let (mut offset, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            let left = (CHUNK_SIZE - offset % CHUNK_SIZE) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(left));
            self.feed_chunk(offset, now);
            offset += now.len() as u64;
            bytes = later;
        }
    }

    fn feed_chunk(&mut self, offset: u64, bytes: &[u8]) {
        let chunk = offset / CHUNK_SIZE;
        let end = offset + bytes.len() as u64;
        match &mut self.current {
            Some(current) if current.chunk == chunk => {
                let late = offset < current.next;
                current.sum.update(bytes);
                current.next = end;
                if late {
                    let (block, at) = self.block(chunk);
                    block.stale.set(at, true);
                }
            }
            _ => {
                self.end_chunk();
                let (block, at) = self.block(chunk);
                if block.present.replace(at, true) {
                    block.stale.set(at, true);
                }
                let mut sum = ChunkSum::new();
                sum.update(bytes);
                self.current = Some(Current {
                    chunk,
                    next: end,
                    sum,
                });
            }
        }
    }

    fn end_chunk(&mut self) {
        if let Some(current) = self.current.take() {
            let (block, at) = self.block(current.chunk);
            block.sums[at] = current.sum.finish();
        }
    }

    /// The chunks, as ranges of guest offsets, whose sums are not those of their present bytes.
    pub fn stale(&self) -> impl Iterator<Item = Range<u64>> {
        self.blocks.iter().flat_map(|(first, block)| {
            block.stale.iter_ones().map(move |at| {
                let start = (first + at as u64) * CHUNK_SIZE;
                start..start + CHUNK_SIZE
            })
        })
    }

    /// Takes `sum` for the chunk from the guest offset `start` on.
    ///
    /// # Panics
    /// Panics where there is no such chunk.
    pub fn replace(&mut self, start: u64, sum: Checksum) {
        self.end_chunk();
        let (block, at) = self.block(start / CHUNK_SIZE);
        block.sums[at] = sum;
        block.stale.set(at, false);
        block.present.set(at, true);
    }

    /// The sums of the chunks with present bytes, ascending: [`Footer::checksums`](crate::Footer::checksums).
    #[must_use]
    pub fn finish(mut self) -> Vec<Checksum> {
        self.end_chunk();
        let count = self.blocks.values().map(|block| block.present.count_ones());
        let mut sums = Vec::with_capacity(count.sum());
        for block in self.blocks.into_values() {
            sums.extend(block.present.iter_ones().map(|at| block.sums[at]));
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(parts: &[&[u8]]) -> Checksum {
        blake3::hash(&parts.concat()).into()
    }

    const MIB: usize = CHUNK_SIZE as usize;

    #[test]
    fn the_present_bytes_of_each_chunk_are_summed_in_order() {
        let mut sums = Checksums::new(4 * CHUNK_SIZE);
        sums.feed(4096, &[1; 4096]);
        sums.feed(16384, &[2; 4096]);
        sums.feed(3 * CHUNK_SIZE - 10, &[3; 20]);
        assert_eq!(sums.stale().count(), 0);
        assert_eq!(
            sums.finish(),
            [
                hash(&[&[1; 4096], &[2; 4096]]),
                hash(&[&[3; 10]]),
                hash(&[&[3; 10]])
            ]
        );
    }

    #[test]
    fn one_large_piece_is_the_same_as_many_small_ones() {
        let bytes: Vec<u8> = (0..3 * MIB + 5000).map(|i| (i % 251) as u8).collect();
        let (mut one, mut many) = (
            Checksums::new(4 * CHUNK_SIZE),
            Checksums::new(4 * CHUNK_SIZE),
        );
        one.feed(0, &bytes);
        for (i, piece) in bytes.chunks(4096).enumerate() {
            many.feed(i as u64 * 4096, piece);
        }
        assert_eq!(one.stale().count() + many.stale().count(), 0);
        assert_eq!(one.finish(), many.finish());
    }

    #[test]
    fn what_comes_late_or_again_makes_its_chunk_stale_until_it_is_replaced() {
        let mut sums = Checksums::new(3 * CHUNK_SIZE);
        sums.feed(8192, &[1; 4096]);
        sums.feed(0, &[2; 4096]); // late
        sums.feed(CHUNK_SIZE, &[3; 4096]);
        assert_eq!(sums.stale().collect::<Vec<_>>(), [0..CHUNK_SIZE]);
        sums.feed(8192, &[4; 4096]); // again
        sums.feed(CHUNK_SIZE + 4096, &[5; 4096]); // beside
        assert_eq!(
            sums.stale().collect::<Vec<_>>(),
            [0..CHUNK_SIZE, CHUNK_SIZE..2 * CHUNK_SIZE]
        );
        sums.replace(0, [7; 32]);
        sums.replace(CHUNK_SIZE, [8; 32]);
        assert_eq!(sums.stale().count(), 0);
        assert_eq!(sums.finish(), [[7; 32], [8; 32]]);
    }
}
