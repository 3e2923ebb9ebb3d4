//! Where runs of set bits begin and end.

/// How many edges are kept: few enough that a lock is not held for long, enough that taking it does not show.
const CAPACITY: usize = 512;
/// Edges written at once, whether or not there are so many. It divides 64: never more than a word can have.
const AT_ONCE: usize = 4;
/// One a bit, and the end of a run where the next word is clear.
const OF_A_WORD: usize = u64::BITS as usize + 1;

/// Edges in ascending order: of a run the first bit, then the first that is not of it, then those of the next run.
#[derive(Debug)]
pub(crate) struct Edges {
    at: [u64; CAPACITY],
    len: usize,
}

impl Edges {
    pub(crate) fn none() -> Self {
        Self {
            at: [0; CAPACITY],
            len: 0,
        }
    }

    #[inline]
    pub(crate) fn all(&self) -> &[u64] {
        &self.at[..self.len]
    }

    pub(crate) fn all_mut(&mut self) -> &mut [u64] {
        &mut self.at[..self.len]
    }

    /// Forgets all but the start of a run whose end was not found yet. Says whether there is one.
    pub(crate) fn keep_open(&mut self) -> bool {
        let open = self.len % 2;
        if open == 1 {
            self.at[0] = self.at[self.len - 1];
        }
        self.len = open;
        open == 1
    }

    /// Whether there is room for those of one more word.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.len + OF_A_WORD <= CAPACITY
    }

    #[inline]
    pub(crate) fn push(&mut self, edge: u64) {
        self.at[self.len] = edge;
        self.len += 1;
    }

    /// Adds the set bits of `edges`, counted from `base`.
    #[inline]
    pub(crate) fn push_word(&mut self, base: u64, mut edges: u64) {
        while edges != 0 {
            // Rather written in vain than a branch for each, which nobody can predict where marks are random.
            let places = self.at[self.len..].first_chunk_mut::<AT_ONCE>();
            let mut found = 0;
            for place in places.expect("there is room for a word") {
                *place = base + u64::from(edges.trailing_zeros());
                found += usize::from(edges != 0);
                edges &= edges.wrapping_sub(1);
            }
            self.len += found;
        }
    }
}

#[cfg(all(test, not(memsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_an_edge_at_every_bit_and_one_behind_the_word() {
        let mut edges = Edges::none();
        while edges.has_room() {
            edges.push(0);
        }
        let before = edges.all().len();
        assert_eq!(before, CAPACITY - 64);
        edges.len -= 1;
        edges.push_word(7, u64::MAX);
        edges.push(71);
        assert!(edges.all()[before - 1..].iter().copied().eq(7..72));
    }
}
