//! Recording of a trace of the demo's KVM guest from KVM's dirty log.

use anyhow::Context;
use guests::kind;
use guests::ledger::{Layout, PAGE};

use super::trace::{Kind, Trace};

const RAM: u64 = 128 << 20;
const INTERVALS: u64 = 32;
/// The number of steps in an interval.
const STEPS: u64 = 6000;
/// The number of steps between two reads of the log: few, so that the order of the trace is nearly
/// that of the writes.
const STEPS_PER_READ: u64 = 6;

/// Runs the guest and reads the log frequently.
pub(crate) fn kvm_demo() -> anyhow::Result<Trace> {
    let pages = u32::try_from(RAM / PAGE).context("the RAM has too many pages")?;
    let mut guest = kind::Kind::Kvm.create(Layout::of(RAM))?;
    guest.boot()?;
    guest.work_until(STEPS)?;
    let tracker = guest.track()?;
    tracker.begin()?.release()?;
    let mut intervals = Vec::new();
    for _ in 0..INTERVALS {
        // Only the first write of an interval to a page faults.
        let mut seen = vec![false; pages as usize];
        let mut interval = Vec::new();
        for _ in 0..STEPS / STEPS_PER_READ {
            guest.work_until(guest.steps() + STEPS_PER_READ)?;
            let epoch = tracker.begin()?;
            for run in epoch.bitmap().runs() {
                let written = (run.start / PAGE) as u32..(run.end / PAGE) as u32;
                interval.extend(
                    written.filter(|page| !std::mem::replace(&mut seen[*page as usize], true)),
                );
            }
            epoch.release()?;
        }
        intervals.push(interval);
    }
    Ok(Trace {
        name: "KVM demo".into(),
        about: format!(
            "the demo's guest with {} MiB and {STEPS} steps per interval, recorded from KVM's \
             dirty log, which was read every {STEPS_PER_READ} steps",
            RAM >> 20
        ),
        kind: Kind::Mixed,
        page_size: PAGE,
        pages,
        intervals,
    })
}
