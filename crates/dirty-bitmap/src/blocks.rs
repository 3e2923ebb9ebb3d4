//! The adaptive choice, for each block, of how much a write fault unprotects.
//!
//! The state here is only a hint. It decides how much a fault unprotects, and every unprotected
//! page is marked. The hints therefore need no ordering among threads, and are plain atomics under
//! loom too.

mod plan;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::geometry::GeometryError;
use crate::policy::Policy;
use crate::table::defaults;
use plan::{Activity, Plan, SAMPLE_PARTS};

/// The size of a block in bytes: 2 MiB.
///
/// An entry of a level-2 page table maps this much, both on x86-64 (4 KiB pages) and in stage 2 on
/// Arm (4 KiB granule).
pub const BLOCK_SIZE: u64 = 2 << 20;

/// The state of all blocks of a tracked RAM.
pub(crate) struct Blocks {
    policy: Policy,
    pages_per_block: u32,
    /// The cost of a fault, in nanoseconds.
    fault_cost: i64,
    /// The cost of writing a page, in nanoseconds.
    page_cost: i64,
    blocks: Box<[Block]>,
}

#[derive(Default)]
struct Block {
    /// The [`Activity`] since the last checkpoint.
    activity: AtomicU64,
    /// The [`Plan`].
    plan: AtomicU64,
}

/// The part of its block that a fault unprotects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unprotect {
    Page,
    Block,
    /// The block except for these pages. Their faults are a sample of the pages that the guest
    /// writes.
    BlockExcept(Range<u32>),
}

impl Blocks {
    /// Creates the state for RAM of `count` blocks. `page_size` divides the block size.
    pub(crate) fn new(count: u64, page_size: u64, policy: Policy) -> Result<Self, GeometryError> {
        let costs = match policy {
            Policy::Cost(costs) => costs,
            _ => Default::default(),
        };
        let (fault_cost, page_cost) = costs.in_nanos(page_size);
        Ok(Self {
            policy,
            pages_per_block: (BLOCK_SIZE / page_size) as u32,
            fault_cost,
            page_cost,
            blocks: defaults(count)?,
        })
    }

    /// Records a fault in page `page` of `block`. Returns the part that it unprotects.
    pub(crate) fn on_fault(&self, block: usize, page: u32) -> Unprotect {
        let Block { activity, plan } = &self.blocks[block];
        let so_far = Activity(activity.load(Relaxed));
        let record = |flags| {
            activity.fetch_or(flags, Relaxed);
        };
        match self.policy {
            Policy::Blocks => {
                record(Activity::UNPROTECTED);
                Unprotect::Block
            }
            Policy::FaultLimit(limit) if so_far.faults() >= limit => {
                record(Activity::UNPROTECTED);
                Unprotect::Block
            }
            Policy::Pages | Policy::FaultLimit(_) => {
                activity.fetch_add(Activity::FAULT, Relaxed);
                Unprotect::Page
            }
            Policy::Cost(_) => {
                let plan = Plan::from_word(plan.load(Relaxed));
                let sample = self.sample(plan);
                // The higher the confidence, the fewer faults unprotect the block.
                let due = so_far.faults() + 1 >= (self.pages_per_block / 8) >> plan.confidence;
                if !so_far.is_unprotected() && self.continues_sweep(block, page) {
                    record(Activity::UNPROTECTED);
                    Unprotect::Block
                } else if sample.contains(&page) {
                    activity.fetch_add(Activity::FAULT | Activity::SAMPLE_FAULT, Relaxed);
                    Unprotect::Page
                } else if so_far.is_unprotected() || !plan.whole || !due {
                    activity.fetch_add(Activity::FAULT, Relaxed);
                    Unprotect::Page
                } else if plan.until_sample > 0 {
                    record(Activity::UNPROTECTED);
                    Unprotect::Block
                } else {
                    record(Activity::UNPROTECTED | Activity::SAMPLED);
                    Unprotect::BlockExcept(sample)
                }
            }
        }
    }

    /// Returns the pages of a block that are its next sample.
    fn sample(&self, plan: Plan) -> Range<u32> {
        let len = self.pages_per_block / SAMPLE_PARTS;
        let start = u32::from(plan.sample_part) * len;
        start..start + len
    }

    /// Returns whether a sequential writer, upward or downward, has just entered the block from its
    /// neighbor.
    fn continues_sweep(&self, block: usize, page: u32) -> bool {
        let up = page == 0 && block > 0 && self.is_full(block - 1);
        let down = page + 1 == self.pages_per_block && self.is_full(block + 1);
        up || down
    }

    /// Returns whether every page of a block was unprotected since the last checkpoint.
    fn is_full(&self, block: usize) -> bool {
        self.blocks.get(block).is_some_and(|block| {
            let activity = Activity(block.activity.load(Relaxed));
            activity.is_unprotected() || activity.faults() >= self.pages_per_block
        })
    }

    /// Updates the plan of `block` at a checkpoint that took `dirty` pages of it.
    pub(crate) fn on_checkpoint(&self, block: usize, dirty: u32) {
        let Block { activity, plan } = &self.blocks[block];
        let activity = Activity(activity.swap(0, Relaxed));
        // Without a fault, there is no observation of the guest: this is the first checkpoint, or
        // only the host wrote the block.
        if activity.0 == 0 || !matches!(self.policy, Policy::Cost(_)) {
            return;
        }
        let current = Plan::from_word(plan.load(Relaxed));
        let pages = self.pages_per_block;
        let next = match (activity.is_unprotected(), activity.is_sampled()) {
            (false, _) => current.after_observation(self.gain(activity.faults(), dirty)),
            (true, true) => {
                let written = pages.min(activity.sample_faults() * SAMPLE_PARTS);
                current.after_observation(self.gain(written, written))
            }
            (true, false) => current.after_no_observation(),
        };
        plan.store(next.to_word(), Relaxed);
    }

    /// Returns the time that unprotecting a whole block saves, in nanoseconds, where unprotecting
    /// single pages takes `faults` faults and `dirty` pages.
    fn gain(&self, faults: u32, dirty: u32) -> i32 {
        let clean = self.pages_per_block.saturating_sub(dirty);
        let gain = (i64::from(faults) - 1) * self.fault_cost - i64::from(clean) * self.page_cost;
        // A quarter of the range, so that differences do not overflow.
        gain.clamp((i32::MIN / 4).into(), (i32::MAX / 4).into()) as i32
    }

    /// Returns the number of blocks that are planned to be unprotected as a whole.
    pub(crate) fn whole_blocks(&self) -> u64 {
        let whole = |block: &&Block| Plan::from_word(block.plan.load(Relaxed)).whole;
        match self.policy {
            Policy::Blocks => self.blocks.len() as u64,
            _ => self.blocks.iter().filter(whole).count() as u64,
        }
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::policy::Costs;

    #[test]
    fn consecutive_samples_cover_each_page_once() {
        let blocks = Blocks::new(1, 4096, Policy::default()).unwrap();
        let mut plan = Plan::from_word(0);
        let mut sampled = Vec::new();
        for _ in 0..SAMPLE_PARTS {
            sampled.extend(blocks.sample(plan));
            plan = plan.after_observation(1);
        }
        sampled.sort_unstable();
        assert!(sampled.into_iter().eq(0..512));
    }

    /// Creates blocks for which a fault costs 1,000 nanoseconds, and a page 100.
    fn blocks(count: u64) -> Blocks {
        let costs = Costs {
            fault: Duration::from_nanos(1000),
            write_mib: Duration::from_nanos(100 * 256),
        };
        Blocks::new(count, 4096, Policy::Cost(costs)).unwrap()
    }

    #[test]
    fn gain_is_the_saved_faults_minus_the_clean_pages() {
        let blocks = blocks(1);
        assert_eq!(blocks.gain(1, 512), 0);
        assert_eq!(blocks.gain(3, 500), 2 * 1000 - 12 * 100);
        assert_eq!(blocks.gain(1, 0), -512 * 100);
        let costly = Costs {
            fault: Duration::from_secs(3600),
            write_mib: Duration::ZERO,
        };
        let costly = Blocks::new(1, 4096, Policy::Cost(costly)).unwrap();
        assert_eq!(costly.gain(512, 512), i32::MAX / 4);
        assert_eq!(costly.gain(0, 512), i32::MIN / 4);
    }

    #[test]
    fn a_sweep_continues_from_a_full_block() {
        let blocks = blocks(3);
        for page in 0..511 {
            blocks.on_fault(1, page);
        }
        assert_eq!(blocks.on_fault(2, 0), Unprotect::Page);
        blocks.on_fault(1, 511);
        assert_eq!(blocks.on_fault(2, 0), Unprotect::Block);
        assert_eq!(blocks.on_fault(0, 510), Unprotect::Page);
        assert_eq!(blocks.on_fault(0, 511), Unprotect::Block);
    }

    #[test]
    fn a_checkpoint_without_faults_leaves_the_plan_unchanged() {
        let blocks = blocks(1);
        blocks.on_checkpoint(0, 512);
        assert_eq!(blocks.blocks[0].plan.load(Relaxed), 0);
    }

    #[test]
    fn policy_blocks_counts_every_block_as_whole() {
        let all = Blocks::new(3, 4096, Policy::Blocks).unwrap();
        assert_eq!(all.whole_blocks(), 3);
        assert_eq!(blocks(3).whole_blocks(), 0);
    }

    #[test]
    fn a_block_is_whole_only_if_the_gain_is_positive() {
        let plan = Plan::from_word(0).after_observation(0);
        assert_eq!((plan.whole, plan.confidence), (false, 0));
        let plan = Plan::from_word(0).after_observation(1);
        assert_eq!((plan.whole, plan.confidence), (true, 1));
    }

    #[test]
    fn an_unobserved_block_is_whole_until_it_is_observed() {
        let unobserved = Plan::from_word(0).after_no_observation();
        assert!(unobserved.whole && unobserved.observed);
        let observed = unobserved.after_observation(-1000);
        assert!(!observed.whole);
        assert!(!observed.after_no_observation().whole);
    }
}
