//! The trace of the demo's KVM guest, from KVM's own dirty log.

use anyhow::Context;

use super::report::Kind;
use super::trace::Trace;
use crate::demo::guest;
use crate::demo::ledger::{Layout, PAGE};

const RAM: u64 = 128 << 20;
const INTERVALS: u64 = 32;
/// Steps of an interval, and between two looks into the log: so few that its order is nearly the order of the writes.
const STEPS: u64 = 6000;
const LOOK: u64 = 6;

/// Runs the guest, and looks into the log all the time.
pub fn kvm_demo() -> anyhow::Result<Trace> {
    let pages = u32::try_from(RAM / PAGE).context("pages of the RAM")?;
    let mut guest = guest::Kind::Kvm.create(Layout::of(RAM))?;
    guest.boot()?;
    guest.work_until(STEPS)?;
    let tracker = guest.track()?;
    tracker.begin()?.release()?;
    let mut intervals = Vec::new();
    for _ in 0..INTERVALS {
        // Only the first write of an interval faults.
        let mut seen = vec![false; pages as usize];
        let mut interval = Vec::new();
        for _ in 0..STEPS / LOOK {
            guest.work_until(guest.steps() + LOOK)?;
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
            "recorded from KVM's dirty log, read every {LOOK} steps: the demo's guest with {} MiB, {STEPS} steps to the interval",
            RAM >> 20
        ),
        kind: Kind::Mixed,
        page_size: PAGE,
        pages,
        intervals,
    })
}
