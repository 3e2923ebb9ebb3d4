//! Checksums of chunks of RAM, computed while an image is written.

use std::collections::BTreeMap;
use std::ops::Range;

use bitvec::BitArr;
use bitvec::array::BitArray;
use zeroize::{Zeroize, Zeroizing};

/// The number of bytes of RAM that one checksum covers: 1 MiB, aligned. A checksum covers the
/// present bytes of the chunk in ascending order.
///
/// The checksums of a guest of 1 TiB take 32 MiB, like a bitmap with a bit for each page of 4 KiB.
pub const CHUNK_SIZE: u64 = 1 << 20;

/// A BLAKE3 hash.
pub type Checksum = [u8; 32];

/// An incremental checksum of one chunk, over its present bytes in ascending order.
///
/// The last 64 bytes are kept until the checksum is dropped, which zeroes them.
// A value that moves leaves a copy behind, which is never zeroed. The hasher stays in one place.
#[derive(Clone, Debug, Default)]
#[must_use = "a checksum is lost unless it is finished"]
pub struct ChunkSum(Box<Zeroizing<blake3::Hasher>>);

impl ChunkSum {
    /// Creates a checksum of no bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
        // `finish` may be called from a place with less stack in use.
        match bytes.len() {
            0..=FEW_BYTES => wipe_stack::<FEW_WIPED>(),
            _ => wipe_stack::<WIPED>(),
        }
    }

    /// Returns the checksum of all bytes.
    #[must_use]
    pub fn finish(&self) -> Checksum {
        let sum = self.0.finalize();
        wipe_stack::<WIPED>();
        sum.into()
    }
}

/// The size of the wiped stack in words: more than the frames of BLAKE3 for a chunk.
const WIPED: usize = 2048;

/// The length of an input, in bytes, that BLAKE3 does not divide recursively: with AVX2 it takes 8
/// chunks of 1 KiB at a time.
const FEW_BYTES: usize = 8 << 10;

/// The size of the wiped stack in words after such an input.
const FEW_WIPED: usize = 640;

/// Zeroes the stack below the caller, where the functions of BLAKE3 have left bytes of their input.
/// The unused bytes of a later value would otherwise take them to the heap.
#[inline(never)]
fn wipe_stack<const WORDS: usize>() {
    [0_u64; WORDS].zeroize();
}

/// The checksums of an image that is being written.
///
/// If bytes are fed in ascending order, as a dump does, the checksums are complete when the dump
/// is. If bytes are late or repeated (a page is written again, or a neighbor of a written page),
/// the checksum of their chunk cannot be computed incrementally. The chunk is then
/// [stale](Self::stale), and its checksum must be [replaced](Self::replace) by that of the bytes in
/// the file.
///
/// Memory: 32 bytes for each chunk with present bytes, in blocks of 512 chunks, and the same amount
/// again in [`finish`](Self::finish). The memory does not grow with the size of the RAM.
#[derive(Clone, Debug)]
#[must_use = "the checksums are lost unless they are finished"]
pub struct Checksums {
    chunks: u64,
    /// Keyed by the number of the first chunk of the block.
    blocks: BTreeMap<u64, Block>,
    current: Option<OpenChunk>,
}

/// The checksums of adjacent chunks, some of which have present bytes.
#[derive(Clone, Debug)]
struct Block {
    sums: Vec<Checksum>,
    /// The chunks with present bytes.
    present: BitArr!(for BLOCK_CHUNKS, in u64),
    stale: BitArr!(for BLOCK_CHUNKS, in u64),
}

/// The number of chunks in a block.
const BLOCK_CHUNKS: usize = 512;

impl Block {
    fn new() -> Self {
        Self {
            sums: vec![[0; 32]; BLOCK_CHUNKS],
            present: BitArray::ZERO,
            stale: BitArray::ZERO,
        }
    }
}

#[derive(Clone, Debug)]
struct OpenChunk {
    chunk: u64,
    /// The guest offset from which on bytes may follow.
    next: u64,
    sum: ChunkSum,
}

impl Checksums {
    /// Creates the checksums of RAM of `ram_size` bytes, none of which is present yet.
    pub fn new(ram_size: u64) -> Self {
        Self {
            chunks: ram_size.div_ceil(CHUNK_SIZE),
            blocks: BTreeMap::new(),
            current: None,
        }
    }

    /// Returns the block of a chunk, and the index of the chunk in it.
    fn block(&mut self, chunk: u64) -> (&mut Block, usize) {
        assert!(chunk < self.chunks, "chunk {chunk} of {}", self.chunks);
        let within = chunk % BLOCK_CHUNKS as u64;
        let block = self.blocks.entry(chunk - within);
        (block.or_insert_with(Block::new), within as usize)
    }

    /// Adds `bytes`, which are present at the guest offset `offset`, replacing earlier ones.
    ///
    /// # Panics
    /// Panics if the bytes end past the last chunk.
    pub fn update(&mut self, offset: u64, bytes: &[u8]) {
        let (mut offset, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            let left = (CHUNK_SIZE - offset % CHUNK_SIZE) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(left));
            self.update_chunk(offset, now);
            offset += now.len() as u64;
            bytes = later;
        }
    }

    fn update_chunk(&mut self, offset: u64, bytes: &[u8]) {
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
                self.current = Some(OpenChunk {
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

    /// Returns the chunks, as ranges of guest offsets, whose checksums do not match their present
    /// bytes.
    pub fn stale(&self) -> impl Iterator<Item = Range<u64>> {
        self.blocks.iter().flat_map(|(first, block)| {
            block.stale.iter_ones().map(move |at| {
                let start = (first + at as u64) * CHUNK_SIZE;
                start..start + CHUNK_SIZE
            })
        })
    }

    /// Sets the checksum of the chunk at the guest offset `start`.
    ///
    /// # Panics
    /// Panics if there is no such chunk.
    pub fn replace(&mut self, start: u64, sum: Checksum) {
        self.end_chunk();
        let (block, at) = self.block(start / CHUNK_SIZE);
        block.sums[at] = sum;
        block.stale.set(at, false);
        block.present.set(at, true);
    }

    /// Returns the checksums of the chunks with present bytes, ascending, for
    /// [`Footer::checksums`](crate::Footer::checksums).
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
    fn checksums_cover_the_present_bytes_in_order() {
        let mut sums = Checksums::new(4 * CHUNK_SIZE);
        sums.update(4096, &[1; 4096]);
        sums.update(16384, &[2; 4096]);
        sums.update(3 * CHUNK_SIZE - 10, &[3; 20]);
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
    fn one_large_piece_equals_many_small_ones() {
        let bytes: Vec<u8> = (0..3 * MIB + 5000).map(|i| (i % 251) as u8).collect();
        let (mut one, mut many) = (
            Checksums::new(4 * CHUNK_SIZE),
            Checksums::new(4 * CHUNK_SIZE),
        );
        one.update(0, &bytes);
        for (i, piece) in bytes.chunks(4096).enumerate() {
            many.update(i as u64 * 4096, piece);
        }
        assert_eq!(one.stale().count() + many.stale().count(), 0);
        assert_eq!(one.finish(), many.finish());
    }

    #[test]
    fn late_and_repeated_bytes_make_a_chunk_stale() {
        let mut sums = Checksums::new(3 * CHUNK_SIZE);
        sums.update(8192, &[1; 4096]);
        sums.update(0, &[2; 4096]); // late
        sums.update(CHUNK_SIZE, &[3; 4096]);
        assert_eq!(sums.stale().collect::<Vec<_>>(), [0..CHUNK_SIZE]);
        sums.update(8192, &[4; 4096]); // again
        sums.update(CHUNK_SIZE + 4096, &[5; 4096]); // beside
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
