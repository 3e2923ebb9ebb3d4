//! A buffer for the boundaries of runs of set bits.

/// The number of edges in a buffer: few, so that the lock is not held for long; enough to make the
/// cost of locking negligible.
const CAPACITY: usize = 512;
/// The number of edges that are stored at a time, valid or not. It divides 64, so it never exceeds
/// the edges of a word.
const CHUNK: usize = 4;
/// The most edges that a word adds: one for each bit, and the end of a run where the next word is
/// clear.
const MAX_PER_WORD: usize = u64::BITS as usize + 1;

/// Edges in ascending order: the first bit of a run, the first bit after it, then the same of the
/// next run.
#[derive(Debug)]
pub(crate) struct Edges {
    at: [u64; CAPACITY],
    len: usize,
}

impl Edges {
    pub(crate) fn new() -> Self {
        Self {
            at: [0; CAPACITY],
            len: 0,
        }
    }

    #[inline]
    pub(crate) fn as_slice(&self) -> &[u64] {
        &self.at[..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u64] {
        &mut self.at[..self.len]
    }

    /// Removes all edges except the start of a run whose end is not found yet. Returns whether
    /// there is such a run.
    pub(crate) fn retain_open_run(&mut self) -> bool {
        let open = self.len % 2;
        if open == 1 {
            self.at[0] = self.at[self.len - 1];
        }
        self.len = open;
        open == 1
    }

    /// Returns whether the edges of one more word fit.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.len + MAX_PER_WORD <= CAPACITY
    }

    #[inline]
    pub(crate) fn push(&mut self, edge: u64) {
        self.at[self.len] = edge;
        self.len += 1;
    }

    /// Appends `base + i` for each set bit `i` of `edges`.
    #[inline]
    pub(crate) fn push_word(&mut self, base: u64, mut edges: u64) {
        while edges != 0 {
            // Storing invalid edges is cheaper than a branch for each, which random marks make
            // unpredictable.
            let slots = self.at[self.len..].first_chunk_mut::<CHUNK>();
            let mut found = 0;
            for slot in slots.expect("the caller checked that a word fits") {
                *slot = base + u64::from(edges.trailing_zeros());
                found += usize::from(edges != 0);
                edges &= edges.wrapping_sub(1);
            }
            self.len += found;
        }
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_edge_at_every_bit_and_one_after_the_word_fit() {
        let mut edges = Edges::new();
        while edges.has_room() {
            edges.push(0);
        }
        let before = edges.as_slice().len();
        assert_eq!(before, CAPACITY - 64);
        edges.len -= 1;
        edges.push_word(7, u64::MAX);
        edges.push(71);
        assert!(edges.as_slice()[before - 1..].iter().copied().eq(7..72));
    }
}
