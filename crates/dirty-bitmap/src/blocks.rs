//! What each block was seen to do, and what a fault in it opens next.
//!
//! All of it is a hint: it decides how much a fault opens, and what was opened is marked whatever it was. So hints need no order among
//! threads, and are plain atomics also under loom.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::geometry::GeometryError;
use crate::policy::Policy;
use crate::table::defaults;

/// The bytes of a block, 2 MiB: what one entry of a level-2 table maps, on x86-64 (4 KiB pages) as in stage 2 on Arm (4 KiB
/// granule).
pub const BLOCK_SIZE: u64 = 2 << 20;

/// A sample is one of so many parts of a block.
const PARTS: u32 = 16;
/// Once a block has shown as often in turn that opening it whole pays, its first fault opens it.
const FULL_TRUST: u8 = 4;
/// With full trust, a sample is taken at one of so many checkpoints.
const SAMPLE_EVERY: u8 = 8;

pub(crate) struct Blocks {
    policy: Policy,
    pages_per_block: u32,
    /// Nanoseconds of a fault, and of writing a page.
    fault: i64,
    page: i64,
    all: Box<[Block]>,
}

#[derive(Default)]
struct Block {
    /// [`Seen`] since the last checkpoint.
    seen: AtomicU64,
    plan: AtomicU64,
}

/// How much of its block a fault opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    Page,
    Block,
    /// The block without these pages of it, whose faults are a sample of what is written.
    AllBut(Range<u32>),
}

/// What happened in a block: faults in the low 24 bits, of them those in the sample's pages in the next 24.
#[derive(Clone, Copy, Debug)]
struct Seen(u64);

impl Seen {
    const FAULT: u64 = 1;
    const IN_SAMPLE: u64 = 1 << 24;
    const OPENED: u64 = 1 << 62;
    const SAMPLED: u64 = 1 << 63;

    fn faults(self) -> u32 {
        (self.0 & 0xff_ffff) as u32
    }

    fn in_sample(self) -> u32 {
        (self.0 >> 24 & 0xff_ffff) as u32
    }

    fn opened(self) -> bool {
        self.0 & Self::OPENED != 0
    }

    fn sampled(self) -> bool {
        self.0 & Self::SAMPLED != 0
    }
}

/// What is to be done with a block, and why, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Opening it whole pays.
    whole: bool,
    /// It was seen at least once, or a part of it.
    known: bool,
    /// As often in turn it was seen to pay.
    trust: u8,
    /// As many checkpoints still until a sample is due.
    sample_in: u8,
    /// Which part the next sample is.
    part: u8,
    /// What opening it whole would have saved at a checkpoint, in nanoseconds: a moving average.
    gain: i32,
}

impl Plan {
    fn of(word: u64) -> Self {
        let [flags, trust, sample_in, part, gain @ ..] = word.to_le_bytes();
        Self {
            whole: flags & 1 != 0,
            known: flags & 2 != 0,
            trust,
            sample_in,
            part,
            gain: i32::from_le_bytes(gain),
        }
    }

    fn word(self) -> u64 {
        let flags = u8::from(self.whole) | u8::from(self.known) << 1;
        let [a, b, c, d] = self.gain.to_le_bytes();
        u64::from_le_bytes([flags, self.trust, self.sample_in, self.part, a, b, c, d])
    }

    /// After a checkpoint at which opening it whole would have saved `gain`.
    fn learnt(self, gain: i32) -> Self {
        let average = match self.known {
            true => self.gain + (gain - self.gain) / 4,
            false => gain,
        };
        let trust = match gain > 0 {
            true => FULL_TRUST.min(self.trust + 1),
            false => 0,
        };
        Self {
            whole: average > 0,
            known: true,
            trust,
            sample_in: if trust == FULL_TRUST {
                SAMPLE_EVERY - 1
            } else {
                0
            },
            // Odd, so that all parts have their turn.
            part: (self.part + 5) % PARTS as u8,
            gain: average,
        }
    }

    /// After a checkpoint that showed nothing.
    fn unseen(self) -> Self {
        Self {
            // Opened by its neighbour's example: worth a try by itself.
            whole: self.whole || !self.known,
            known: true,
            sample_in: self.sample_in.saturating_sub(1),
            ..self
        }
    }
}

impl Blocks {
    /// For RAM of `count` blocks, in pages that divide a block.
    pub(crate) fn new(count: u64, page_size: u64, policy: Policy) -> Result<Self, GeometryError> {
        let costs = match policy {
            Policy::Cost(costs) => costs,
            _ => Default::default(),
        };
        let (fault, page) = costs.in_nanos(page_size);
        Ok(Self {
            policy,
            pages_per_block: (BLOCK_SIZE / page_size) as u32,
            fault,
            page,
            all: defaults(count)?,
        })
    }

    /// A fault in page `page` of `block`: how much it opens.
    pub(crate) fn on_fault(&self, block: usize, page: u32) -> Opening {
        let Block { seen, plan } = &self.all[block];
        let so_far = Seen(seen.load(Relaxed));
        let open = |as_what| {
            seen.fetch_or(as_what, Relaxed);
        };
        match self.policy {
            Policy::Blocks => {
                open(Seen::OPENED);
                Opening::Block
            }
            Policy::FaultLimit(limit) if so_far.faults() >= limit => {
                open(Seen::OPENED);
                Opening::Block
            }
            Policy::Pages | Policy::FaultLimit(_) => {
                seen.fetch_add(Seen::FAULT, Relaxed);
                Opening::Page
            }
            Policy::Cost(_) => {
                let plan = Plan::of(plan.load(Relaxed));
                let sample = self.sample(plan);
                // What has just shown to be written all over is opened by few faults, or by one.
                let due = so_far.faults() + 1 >= (self.pages_per_block / 8) >> plan.trust;
                if !so_far.opened() && self.is_swept(block, page) {
                    open(Seen::OPENED);
                    Opening::Block
                } else if sample.contains(&page) {
                    seen.fetch_add(Seen::FAULT | Seen::IN_SAMPLE, Relaxed);
                    Opening::Page
                } else if so_far.opened() || !plan.whole || !due {
                    seen.fetch_add(Seen::FAULT, Relaxed);
                    Opening::Page
                } else if plan.sample_in > 0 {
                    open(Seen::OPENED);
                    Opening::Block
                } else {
                    open(Seen::OPENED | Seen::SAMPLED);
                    Opening::AllBut(sample)
                }
            }
        }
    }

    /// The pages of a block that its next sample is of.
    fn sample(&self, plan: Plan) -> Range<u32> {
        let len = self.pages_per_block / PARTS;
        let start = u32::from(plan.part) * len;
        start..start + len
    }

    /// Whether somebody who writes all memory in turn, up or down, has just come into the block from its neighbour.
    fn is_swept(&self, block: usize, page: u32) -> bool {
        let up = page == 0 && block > 0 && self.is_full(block - 1);
        let down = page + 1 == self.pages_per_block && self.is_full(block + 1);
        up || down
    }

    fn is_full(&self, block: usize) -> bool {
        self.all.get(block).is_some_and(|block| {
            let seen = Seen(block.seen.load(Relaxed));
            seen.opened() || seen.faults() >= self.pages_per_block
        })
    }

    /// A checkpoint took `dirty` pages out of `block`: what happens to it next.
    pub(crate) fn on_checkpoint(&self, block: usize, dirty: u32) {
        let Block { seen, plan } = &self.all[block];
        let seen = Seen(seen.swap(0, Relaxed));
        // No fault: the first checkpoint of all, or the host wrote it. Nothing is known of the guest.
        if seen.0 == 0 || !matches!(self.policy, Policy::Cost(_)) {
            return;
        }
        let now = Plan::of(plan.load(Relaxed));
        let pages = self.pages_per_block;
        let next = match (seen.opened(), seen.sampled()) {
            (false, _) => now.learnt(self.gain(seen.faults(), dirty)),
            (true, true) => {
                let written = pages.min(seen.in_sample() * PARTS);
                now.learnt(self.gain(written, written))
            }
            (true, false) => now.unseen(),
        };
        plan.store(next.word(), Relaxed);
    }

    /// What opening a block whole saves where it costs `faults` in pages, and `dirty` of its pages are to be written anyway.
    fn gain(&self, faults: u32, dirty: u32) -> i32 {
        let clean = self.pages_per_block.saturating_sub(dirty);
        let gain = (i64::from(faults) - 1) * self.fault - i64::from(clean) * self.page;
        // A quarter of the range: differences fit, too.
        gain.clamp((i32::MIN / 4).into(), (i32::MAX / 4).into()) as i32
    }

    /// The blocks that are opened whole as soon as they are written all over again.
    pub(crate) fn whole(&self) -> u64 {
        let whole = |block: &&Block| Plan::of(block.plan.load(Relaxed)).whole;
        match self.policy {
            Policy::Blocks => self.all.len() as u64,
            _ => self.all.iter().filter(whole).count() as u64,
        }
    }
}

#[cfg(all(test, not(memsnap_loom)))]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_plan_is_a_word_and_back(
            whole: bool, known: bool, trust: u8, sample_in: u8, part: u8, gain: i32,
        ) {
            let plan = Plan { whole, known, trust, sample_in, part, gain };
            let back = Plan::of(plan.word());
            prop_assert_eq!((back.whole, back.known), (whole, known));
            prop_assert_eq!((back.trust, back.sample_in, back.part), (trust, sample_in, part));
            prop_assert_eq!(back.gain, gain);
        }
    }

    #[test]
    fn in_turn_every_page_is_in_a_sample_once() {
        let blocks = Blocks::new(1, 4096, Policy::default()).unwrap();
        let mut plan = Plan::of(0);
        let mut sampled = Vec::new();
        for _ in 0..PARTS {
            sampled.extend(blocks.sample(plan));
            plan = plan.learnt(1);
        }
        sampled.sort_unstable();
        assert!(sampled.into_iter().eq(0..512));
    }

    /// A fault costs 1,000 nanoseconds, a page 100.
    fn blocks(count: u64) -> Blocks {
        let costs = crate::Costs {
            fault: Duration::from_nanos(1000),
            mebibyte: Duration::from_nanos(100 * 256),
        };
        Blocks::new(count, 4096, Policy::Cost(costs)).unwrap()
    }

    #[test]
    fn what_opening_a_block_whole_saves_is_all_faults_but_one_less_the_clean_pages() {
        let blocks = blocks(1);
        assert_eq!(blocks.gain(1, 512), 0);
        assert_eq!(blocks.gain(3, 500), 2 * 1000 - 12 * 100);
        assert_eq!(blocks.gain(1, 0), -512 * 100);
        let costly = crate::Costs {
            fault: Duration::from_secs(3600),
            mebibyte: Duration::ZERO,
        };
        let costly = Blocks::new(1, 4096, Policy::Cost(costly)).unwrap();
        assert_eq!(costly.gain(512, 512), i32::MAX / 4);
        assert_eq!(costly.gain(0, 512), i32::MIN / 4);
    }

    #[test]
    fn a_sweep_comes_from_a_block_that_is_full() {
        let blocks = blocks(3);
        for page in 0..511 {
            blocks.on_fault(1, page);
        }
        assert_eq!(blocks.on_fault(2, 0), Opening::Page);
        blocks.on_fault(1, 511);
        assert_eq!(blocks.on_fault(2, 0), Opening::Block);
        assert_eq!(blocks.on_fault(0, 510), Opening::Page);
        assert_eq!(blocks.on_fault(0, 511), Opening::Block);
    }

    #[test]
    fn a_checkpoint_without_faults_teaches_nothing() {
        let blocks = blocks(1);
        blocks.on_checkpoint(0, 512);
        assert_eq!(Plan::of(blocks.all[0].plan.load(Relaxed)), Plan::of(0));
    }

    #[test]
    fn by_blocks_all_are_opened_whole() {
        assert_eq!(Blocks::new(3, 4096, Policy::Blocks).unwrap().whole(), 3);
        assert_eq!(blocks(3).whole(), 0);
    }

    #[test]
    fn a_block_that_pays_nothing_whole_is_not_opened_whole() {
        let learnt = Plan::of(0).learnt(0);
        assert_eq!((learnt.whole, learnt.trust), (false, 0));
        let learnt = Plan::of(0).learnt(1);
        assert_eq!((learnt.whole, learnt.trust), (true, 1));
    }

    #[test]
    fn a_block_opened_by_its_neighbours_example_is_tried_by_itself() {
        let fresh = Plan::of(0).unseen();
        assert!(fresh.whole && fresh.known);
        let tried = fresh.learnt(-1000);
        assert!(!tried.whole);
        assert!(!tried.unseen().whole, "it has shown that it does not pay");
    }
}
