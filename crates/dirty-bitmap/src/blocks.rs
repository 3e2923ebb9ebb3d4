//! What each block was seen to do, and what a fault in it opens next.
//!
//! All of it is a hint: it decides how much a fault opens, and what was opened is marked whatever it was. So hints need no order among
//! threads, and are plain atomics also under loom.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::geometry::GeometryError;
use crate::policy::Policy;

/// The bytes of a block, 2 MiB: what one entry of a level-2 table maps, on x86-64 (4 KiB pages) as in stage 2 on Arm (4 KiB
/// granule).
pub const BLOCK_SIZE: u64 = 2 << 20;

/// How many of the checkpoints at which a block was written may pass, at most, before it is looked at in pages again.
const LONGEST_TRUST: u8 = 6;

pub(crate) struct Blocks {
    policy: Policy,
    pages_per_block: u32,
    /// Time of a fault, and of writing a page.
    fault: i64,
    page: i64,
    all: Box<[Block]>,
}

#[derive(Default)]
struct Block {
    /// Since the last checkpoint: how many faults, and whether one opened the whole block.
    seen: AtomicU32,
    plan: AtomicU64,
}

const OPENED_WHOLE: u32 = 1 << 31;

/// What is to be done with a block, and why, in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Plan {
    /// The next fault opens the whole block.
    whole: bool,
    /// It was seen in pages at least once.
    known: bool,
    /// As often it is opened whole before it is looked at in pages: two to the power of this.
    trust: u8,
    /// As often still.
    left: u8,
    /// What opening it whole would have saved at a checkpoint, in nanoseconds: a moving average.
    gain: i32,
}

impl Plan {
    fn of(word: u64) -> Self {
        let [flags, trust, left, _, gain @ ..] = word.to_le_bytes();
        Self {
            whole: flags & 1 != 0,
            known: flags & 2 != 0,
            trust,
            left,
            gain: i32::from_le_bytes(gain),
        }
    }

    fn word(self) -> u64 {
        let flags = u8::from(self.whole) | u8::from(self.known) << 1;
        let [a, b, c, d] = self.gain.to_le_bytes();
        u64::from_le_bytes([flags, self.trust, self.left, 0, a, b, c, d])
    }
}

impl Blocks {
    /// `pages_per_block` is at least 1.
    pub(crate) fn new(count: u64, page_size: u64, policy: Policy) -> Result<Self, GeometryError> {
        let failed = || GeometryError::OutOfMemory {
            bytes: count.saturating_mul(size_of::<Block>() as u64),
        };
        let len = usize::try_from(count).map_err(|_| failed())?;
        let mut all = Vec::new();
        all.try_reserve_exact(len).map_err(|_| failed())?;
        all.resize_with(len, Block::default);
        let costs = match policy {
            Policy::Cost(costs) => costs,
            _ => Default::default(),
        };
        let (fault, page) = costs.in_nanos(page_size);
        Ok(Self {
            policy,
            pages_per_block: u32::try_from(BLOCK_SIZE / page_size).unwrap_or(u32::MAX),
            fault,
            page,
            all: all.into_boxed_slice(),
        })
    }

    /// A fault in page `page` of `block`: whether it opens the whole block.
    pub(crate) fn on_fault(&self, block: usize, page: u32) -> bool {
        let Block { seen, plan } = &self.all[block];
        let whole = match self.policy {
            Policy::Pages => false,
            Policy::Blocks => true,
            Policy::FaultLimit(limit) => {
                Plan::of(plan.load(Relaxed)).whole || seen.load(Relaxed) >= limit
            }
            Policy::Cost(_) => {
                let plan = Plan::of(plan.load(Relaxed));
                plan.whole || !plan.known && self.is_swept(block, page)
            }
        };
        if whole {
            seen.fetch_or(OPENED_WHOLE, Relaxed);
        } else {
            seen.fetch_add(1, Relaxed);
        }
        whole
    }

    /// Whether somebody who writes all memory in turn, up or down, has just come into the block from its neighbour.
    fn is_swept(&self, block: usize, page: u32) -> bool {
        let up = page == 0 && block > 0 && self.is_full(block - 1);
        let down = page + 1 == self.pages_per_block && self.is_full(block + 1);
        up || down
    }

    fn is_full(&self, block: usize) -> bool {
        let block = self.all.get(block);
        block.is_some_and(|block| block.seen.load(Relaxed) >= self.pages_per_block)
    }

    /// A checkpoint took `dirty` pages out of `block`: what happens to it next.
    pub(crate) fn on_checkpoint(&self, block: usize, dirty: u32) {
        let Block { seen, plan } = &self.all[block];
        let seen = seen.swap(0, Relaxed);
        // Not a fault: the first checkpoint of all, or the host wrote it. Nothing is known of the guest.
        if seen == 0 {
            return;
        }
        let now = Plan::of(plan.load(Relaxed));
        let next = match self.policy {
            Policy::Pages | Policy::Blocks => return,
            _ if seen & OPENED_WHOLE != 0 && now.whole => now.trusted_once_more(),
            Policy::FaultLimit(_) if seen & OPENED_WHOLE != 0 => {
                now.opened_whole_from_now_on(LONGEST_TRUST)
            }
            Policy::FaultLimit(_) => Plan::default(),
            // By the neighbour's example: now it is looked at by itself.
            Policy::Cost(_) if seen & OPENED_WHOLE != 0 => Plan { known: true, ..now },
            Policy::Cost(_) => {
                let clean = i64::from(self.pages_per_block.saturating_sub(dirty));
                let gain = i64::from(seen) * self.fault - (self.fault + clean * self.page);
                now.learnt(gain.clamp(i32::MIN.into(), i32::MAX.into()) as i32)
            }
        };
        plan.store(next.word(), Relaxed);
    }

    /// The blocks that the next fault opens whole.
    pub(crate) fn whole(&self) -> u64 {
        let whole = |block: &&Block| Plan::of(block.plan.load(Relaxed)).whole;
        match self.policy {
            Policy::Blocks => self.all.len() as u64,
            _ => self.all.iter().filter(whole).count() as u64,
        }
    }
}

impl Plan {
    fn opened_whole_from_now_on(self, trust: u8) -> Self {
        Self {
            whole: true,
            trust,
            left: 1 << trust,
            ..self
        }
    }

    fn trusted_once_more(self) -> Self {
        let left = self.left.saturating_sub(1);
        // None left: the next checkpoint's faults are counted in pages, and tell whether it was right.
        Self {
            whole: left > 0,
            left,
            ..self
        }
    }

    fn learnt(self, gain: i32) -> Self {
        let average = match self.known {
            true => self.gain + (gain - self.gain) / 4,
            false => gain,
        };
        let trust = match gain > 0 {
            true => LONGEST_TRUST.min(self.trust + 1),
            false => 0,
        };
        let plan = Self {
            known: true,
            gain: average,
            trust,
            whole: false,
            left: 0,
        };
        if average > 0 {
            plan.opened_whole_from_now_on(trust)
        } else {
            plan
        }
    }
}
