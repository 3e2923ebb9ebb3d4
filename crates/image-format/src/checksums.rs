//! Checksums of the RAM's chunks, computed while their bytes pass by.

use std::ops::Range;

use bitvec::vec::BitVec;

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
/// Memory: 32 bytes a chunk.
#[derive(Clone, Debug)]
pub struct Checksums {
    sums: Vec<Checksum>,
    /// Chunks with present bytes.
    present: BitVec<u64>,
    stale: BitVec<u64>,
    current: Option<Current>,
}

#[derive(Clone, Debug)]
struct Current {
    chunk: usize,
    /// The guest offset from which on bytes may follow.
    next: u64,
    sum: ChunkSum,
}

impl Checksums {
    /// For RAM of `ram_size` bytes, of which none is present yet.
    #[must_use]
    pub fn new(ram_size: u64) -> Self {
        let chunks = ram_size.div_ceil(CHUNK_SIZE) as usize;
        Self {
            sums: vec![[0; 32]; chunks],
            present: BitVec::repeat(false, chunks),
            stale: BitVec::repeat(false, chunks),
            current: None,
        }
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
        let chunk = (offset / CHUNK_SIZE) as usize;
        let end = offset + bytes.len() as u64;
        match &mut self.current {
            Some(current) if current.chunk == chunk => {
                if offset < current.next {
                    self.stale.set(chunk, true);
                }
                current.sum.update(bytes);
                current.next = end;
            }
            _ => {
                self.end_chunk();
                if self.present.replace(chunk, true) {
                    self.stale.set(chunk, true);
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
            self.sums[current.chunk] = current.sum.finish();
        }
    }

    /// The chunks, as ranges of guest offsets, whose sums are not those of their present bytes.
    pub fn stale(&self) -> impl Iterator<Item = Range<u64>> {
        self.stale.iter_ones().map(|chunk| {
            let start = chunk as u64 * CHUNK_SIZE;
            start..start + CHUNK_SIZE
        })
    }

    /// Takes `sum` for the chunk from the guest offset `start` on.
    ///
    /// # Panics
    /// Panics where there is no such chunk.
    pub fn replace(&mut self, start: u64, sum: Checksum) {
        self.end_chunk();
        let chunk = (start / CHUNK_SIZE) as usize;
        self.sums[chunk] = sum;
        self.stale.set(chunk, false);
        self.present.set(chunk, true);
    }

    /// The sums of the chunks with present bytes, ascending: [`Footer::checksums`](crate::Footer::checksums).
    #[must_use]
    pub fn finish(mut self) -> Vec<Checksum> {
        self.end_chunk();
        let mut chunk = 0;
        self.sums.retain(|_| {
            chunk += 1;
            self.present[chunk - 1]
        });
        self.sums
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
