//! The pages of a set, by number: bitmaps in blocks that are allocated on demand, and runs of whole
//! blocks.

use std::collections::BTreeMap;
use std::ops::Range;

use bitvec::BitArr;
use bitvec::array::BitArray;
use bitvec::order::Lsb0;

use crate::ranges::runs_of;

/// The number of pages in a block.
pub(super) const BLOCK: u64 = 4096;

type Bits = BitArr!(for BLOCK as usize, in u64, Lsb0);

/// A set of page numbers.
#[derive(Clone, Default)]
pub(super) struct Spans {
    /// Keyed by the number of the first block. Spans do not overlap.
    spans: BTreeMap<u64, Span>,
}

#[derive(Clone)]
enum Span {
    /// This many blocks with all of their pages.
    Full(u64),
    /// One block with some of its pages.
    Partial(Box<Bits>),
}

impl Spans {
    pub(super) fn add(&mut self, pages: Range<u64>) {
        self.set(pages, true);
    }

    pub(super) fn remove(&mut self, pages: Range<u64>) {
        self.set(pages, false);
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        self.runs_in(page..page + 1).next().is_some()
    }

    /// Returns the runs inside `pages`, ascending. Runs of adjacent spans are not joined.
    pub(super) fn runs_in(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (first, end) = (pages.start / BLOCK, pages.end.div_ceil(BLOCK));
        // A span of several blocks may begin before the first block and reach into it.
        let before = self.spans.range(..first).next_back();
        let spans = self.spans.range(first..end.max(first));
        before.into_iter().chain(spans).flat_map(move |(at, span)| {
            let at = at * BLOCK;
            let within = |len: u64| {
                let start = pages.start.max(at).min(at + len);
                start..pages.end.min(at + len).max(start)
            };
            let (run, bits) = match span {
                Span::Full(blocks) => (Some(within(blocks * BLOCK)), None),
                Span::Partial(bits) => {
                    let within = within(BLOCK);
                    let asked = (within.start - at) as usize..(within.end - at) as usize;
                    (None, Some((within.start, &bits[asked])))
                }
            };
            let runs = bits.into_iter().flat_map(|(start, bits)| {
                runs_of(bits).map(move |run| start + run.start..start + run.end)
            });
            run.into_iter().filter(|run| !run.is_empty()).chain(runs)
        })
    }

    fn set(&mut self, pages: Range<u64>, value: bool) {
        let Range { mut start, end } = pages;
        while start < end {
            let block = start / BLOCK;
            if start.is_multiple_of(BLOCK) && end - start >= BLOCK {
                let blocks = block..end / BLOCK;
                start = blocks.end * BLOCK;
                self.set_blocks(blocks, value);
                continue;
            }
            let first = block * BLOCK;
            let within = start - first..BLOCK.min(end - first);
            start = first + within.end;
            let within = within.start as usize..within.end as usize;
            if let Some(Span::Partial(bits)) = self.spans.get_mut(&block) {
                bits[within].fill(value);
            } else if self.is_full(block) != value {
                self.bits(block)[within].fill(value);
            }
        }
    }

    /// Adds or removes whole blocks.
    fn set_blocks(&mut self, blocks: Range<u64>, value: bool) {
        self.split(blocks.start);
        self.split(blocks.end);
        while let Some((&first, _)) = self.spans.range(blocks.clone()).next() {
            self.spans.remove(&first);
        }
        if value {
            let len = blocks.end - blocks.start;
            self.spans.insert(blocks.start, Span::Full(len));
        }
    }

    /// Returns whether a span of whole blocks has `block`.
    fn is_full(&self, block: u64) -> bool {
        match self.spans.range(..=block).next_back() {
            Some((first, Span::Full(blocks))) => block < first + blocks,
            Some((_, Span::Partial(_))) | None => false,
        }
    }

    /// Ensures that no span reaches from before `block` into it.
    fn split(&mut self, block: u64) {
        let Some((&first, Span::Full(blocks))) = self.spans.range_mut(..block).next_back() else {
            return;
        };
        let end = first + *blocks;
        if end > block {
            *blocks = block - first;
            self.spans.insert(block, Span::Full(end - block));
        }
    }

    /// Returns the bits of a block.
    fn bits(&mut self, block: u64) -> &mut Bits {
        self.split(block);
        self.split(block + 1);
        let none = || Span::Partial(Box::new(BitArray::ZERO));
        let span = self.spans.entry(block).or_insert_with(none);
        if let Span::Full(_) = span {
            let mut all = Box::new(BitArray::ZERO);
            all.fill(true);
            *span = Span::Partial(all);
        }
        match span {
            Span::Partial(bits) => bits,
            Span::Full(_) => unreachable!("it was replaced"),
        }
    }
}
