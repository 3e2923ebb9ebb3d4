//! A simulated run of a trace through the tracker, and its costs.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use dirty_bitmap::{Costs, Policy, TrackedBitmap, TrackedEpoch, WriteProtection, WriteTracker};

use super::trace::Trace;

/// The costs of tracking and of writing the tracked pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    pub faults: u64,
    /// The bytes written at checkpoints.
    pub bytes: u64,
    /// The bytes of clean pages among them.
    pub clean: u64,
    /// The number of calls that protect memory again.
    pub calls: u64,
    /// The time of the faults.
    pub faulting: Duration,
    /// The time of writing.
    pub writing: Duration,
}

impl Cost {
    pub(crate) fn total(&self) -> Duration {
        self.faulting + self.writing
    }
}

/// The simulated memory: a flag for each page that is protected.
struct Memory {
    page_size: u64,
    protected: RefCell<Vec<bool>>,
    calls: Cell<u64>,
}

impl Memory {
    fn set(&self, range: Range<u64>, protected: bool) {
        let page = |address| (address / self.page_size) as usize;
        self.protected.borrow_mut()[page(range.start)..page(range.end)].fill(protected);
    }
}

impl WriteProtection for Memory {
    type Error = Infallible;

    fn protect(&self, range: Range<u64>) -> Result<(), Infallible> {
        self.calls.set(self.calls.get() + 1);
        self.set(range, true);
        Ok(())
    }

    fn unprotect(&self, range: Range<u64>) -> Result<(), Infallible> {
        self.set(range, false);
        Ok(())
    }
}

/// Runs `trace` under `policy`. The first checkpoint, which protects all RAM, is not part of the
/// costs.
pub(crate) fn run(trace: &Trace, policy: Policy, costs: Costs) -> Cost {
    let page = trace.page_size;
    let memory = Memory {
        page_size: page,
        protected: RefCell::new(vec![false; trace.pages as usize]),
        calls: Cell::new(0),
    };
    let bitmap = TrackedBitmap::tracked(0, u64::from(trace.pages) * page, page);
    let bitmap = Arc::new(bitmap.expect("a trace has pages"));
    let tracker = WriteTracker::new(bitmap, policy).expect("whole pages");
    let release = |epoch: TrackedEpoch| epoch.release().expect("no thread reclaims this epoch");
    let checkpoint = || {
        tracker
            .checkpoint(&memory)
            .expect("no other save is in progress")
    };
    release(checkpoint());
    memory.calls.set(0);
    let mut cost = Cost::default();
    let mut written = vec![false; trace.pages as usize];
    for interval in &trace.intervals {
        for number in interval {
            written[*number as usize] = true;
            if memory.protected.borrow()[*number as usize] {
                cost.faults += 1;
                let address = u64::from(*number) * page;
                tracker
                    .on_write_fault(address, &memory)
                    .expect("the page is in the RAM");
            }
        }
        let epoch = checkpoint();
        for run in epoch.bitmap().runs() {
            cost.bytes += run.end - run.start;
            let pages = &mut written[(run.start / page) as usize..(run.end / page) as usize];
            cost.clean += pages.iter().filter(|written| !**written).count() as u64 * page;
            pages.fill(false);
        }
        assert!(!written.contains(&true), "a page was lost");
        release(epoch);
    }
    cost.calls = memory.calls.get();
    cost.faulting =
        costs.fault * u32::try_from(cost.faults).expect("the number of faults fits 32 bits");
    cost.writing = costs
        .write_mib
        .mul_f64(cost.bytes as f64 / f64::from(1 << 20));
    cost
}
