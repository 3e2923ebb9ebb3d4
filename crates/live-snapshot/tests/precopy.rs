//! Pre-copy: when it ends, and guests whose tracker cannot copy pages before they are overwritten.

#![cfg(not(ramsnap_loom))]

use std::convert::Infallible;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dirty_bitmap::{Extension, Policy, TrackedBitmap, TrackedEpoch, WriteProtection, WriteTracker};
use guest_ram::TrackedRam;
use live_snapshot::{
    CaptureSlot, CheckpointFailed, LiveError, LiveSnapshot, LiveSnapshotOptions, LiveTracker,
    Method, Report, StopReason,
};
use memory_writer::{Durability, MemoryWriter, Progress};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;

const PAGE: u64 = 4096;
const SIZE: u64 = 4 << 20;

struct NoProtection;

impl WriteProtection for NoProtection {
    type Error = Infallible;

    fn protect(&self, _: Range<u64>) -> Result<(), Infallible> {
        Ok(())
    }

    fn unprotect(&self, _: Range<u64>) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A guest that marks what it writes, and whose tracker has no slot for a capture.
struct Emulator {
    ram: Arc<TrackedRam>,
    tracker: WriteTracker,
}

impl Emulator {
    fn new() -> Arc<Self> {
        let ram = TrackedRam::new(RamLayout::single(0, SIZE).unwrap()).unwrap();
        let bitmap = Arc::clone(ram.dirty_bitmap());
        let tracker = WriteTracker::new(bitmap, Policy::Pages).unwrap();
        let guest = Self {
            ram: Arc::new(ram),
            tracker,
        };
        guest.write(0..SIZE / PAGE, 1);
        Arc::new(guest)
    }

    fn write(&self, pages: impl IntoIterator<Item = u64>, seed: u64) {
        for page in pages {
            let word = (page << 32 ^ seed).to_ne_bytes();
            self.ram.write_at(page * PAGE, &word).unwrap();
        }
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        self.ram.read_at(0, &mut bytes).unwrap();
        bytes
    }
}

impl LiveTracker for Emulator {
    fn memory(&self) -> Arc<dyn PageReader + Send + Sync> {
        Arc::clone(&self.ram) as _
    }

    fn bitmap(&self) -> &Arc<TrackedBitmap> {
        self.tracker.bitmap()
    }

    fn begin_epoch(&self) -> Result<TrackedEpoch, CheckpointFailed> {
        Ok(self.tracker.checkpoint(&NoProtection)?)
    }

    fn extend_epoch<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<Extension<'e>, CheckpointFailed> {
        Ok(self.tracker.checkpoint_incremental(epoch, &NoProtection)?)
    }

    fn freeze_epoch(
        &self,
        epoch: &mut TrackedEpoch,
        frozen: &mut dyn FnMut(&Extension<'_>),
    ) -> Result<(), CheckpointFailed> {
        frozen(&self.tracker.checkpoint_incremental(epoch, &NoProtection)?);
        Ok(())
    }

    fn slot(&self) -> Option<&CaptureSlot> {
        None
    }
}

/// Takes a full image by pre-copy while the guest writes `dirtied` pages in the passes, and writes
/// page 1 in the pause. Checks the image.
fn precopy(dirtied: &'static [u64], options: LiveSnapshotOptions) -> Report {
    let guest = Emulator::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    let pass = Arc::new(AtomicUsize::new(0));
    let callback = {
        let guest = Arc::clone(&guest);
        move |progress: Progress| {
            if progress.done == progress.total {
                let pass = pass.fetch_add(1, Ordering::SeqCst);
                let count = dirtied.get(pass).copied().unwrap_or(0);
                guest.write(0..count, pass as u64 + 2);
            }
            ControlFlow::Continue(())
        }
    };
    let writer = MemoryWriter::options()
        .durability(Durability::None)
        .progress(callback)
        .open(&path, SIZE, PAGE)
        .unwrap();
    let live = options.begin(&guest, writer).unwrap();
    guest.write([1, 1000], 77);
    let ram = guest.contents();
    let frozen = live.freeze().unwrap();
    guest.write([1, 2], 78);
    let report = frozen.commit().unwrap();
    assert!(std::fs::read(&path).unwrap() == ram);
    assert_eq!(guest.bitmap().dirty_pages(), 2);
    report
}

#[rstest]
#[case::small_at_once(&[20], 20, 30, StopReason::SmallRemainder, &[20])]
#[case::small_after_passes(&[500, 100, 20], 20, 30, StopReason::SmallRemainder, &[500, 100, 20])]
#[case::nothing_dirtied(&[], 0, 30, StopReason::SmallRemainder, &[0])]
#[case::same_rate(&[100, 100, 100], 20, 30, StopReason::NotShrinking, &[100, 100, 100])]
#[case::just_not_shrinking(&[100, 96, 92], 20, 30, StopReason::NotShrinking, &[100, 96, 92])]
#[case::one_stall_is_not_enough(
    &[100, 99, 50, 50, 21, 20], 20, 30, StopReason::SmallRemainder, &[100, 99, 50, 50, 21, 20]
)]
#[case::exactly_shrinking(&[100, 95, 90], 20, 3, StopReason::MaxPasses, &[100, 95, 90])]
#[case::max_passes(&[500, 400], 20, 2, StopReason::MaxPasses, &[500, 400])]
#[case::one_pass(&[500], 20, 0, StopReason::MaxPasses, &[500])]
fn passes_end_for_a_reason(
    #[case] dirtied: &'static [u64],
    #[case] remainder: u64,
    #[case] max_passes: u32,
    #[case] reason: StopReason,
    #[case] expected: &[u64],
) {
    let options = LiveSnapshot::options()
        .remainder(remainder * PAGE)
        .max_passes(max_passes);
    let report = precopy(dirtied, options);
    assert_eq!(report.method, Method::PreCopy);
    let convergence = report.convergence.unwrap();
    assert_eq!(convergence.reason, reason);
    let passes = &report.passes;
    let found: Vec<_> = passes.iter().map(|pass| pass.dirtied / PAGE).collect();
    assert_eq!(found, expected);
    assert_eq!(convergence.remaining, passes.last().unwrap().dirtied);
    // Each pass writes what the pass before left.
    assert_eq!(passes[0].written, SIZE);
    for pair in passes.windows(2) {
        assert_eq!(pair[1].written, pair[0].dirtied);
    }
    for pass in passes {
        assert!(pass.took > Duration::ZERO);
        let dirtied = pass.dirty_rate() * pass.took.as_secs_f64();
        assert!((dirtied - pass.dirtied as f64).abs() < 1.0, "{pass:?}");
        let seconds = pass.written as f64 / pass.write_rate();
        assert!((seconds - pass.took.as_secs_f64()).abs() < 1e-6, "{pass:?}");
    }
    let last = passes.last().unwrap();
    let expected_write = last.dirtied as f64 / last.write_rate();
    let error = convergence.expected_write.as_secs_f64() - expected_write;
    assert!(error.abs() < 1e-6, "{convergence:?}");
    // Those that the last pass left, and pages 1 and 1000.
    let left = expected.last().unwrap();
    let left = left + u64::from(*left < 2) + u64::from(*left < 1001);
    assert_eq!(report.protected_in_pause, left * PAGE);
    assert_eq!(report.copied_before_write, 0);
    assert!(report.freeze > Duration::ZERO);
}

#[test]
fn guest_without_copies_gets_every_method_but_copy_on_write() {
    let guest = Emulator::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    let writer = || MemoryWriter::open(&path, SIZE, PAGE).unwrap();
    let refused = LiveSnapshot::options().method(Method::CopyOnWrite);
    let refused = refused.begin(&guest, writer());
    assert!(
        matches!(refused, Err(LiveError::NoCopyOnWrite)),
        "{refused:?}"
    );
    for (method, used) in [
        (Method::Auto, Method::PreCopy),
        (Method::PreCopy, Method::PreCopy),
        (Method::StopAndCopy, Method::StopAndCopy),
    ] {
        let options = LiveSnapshot::options().method(method);
        let live = options.begin(&guest, writer()).unwrap();
        guest.write([1, 1000], 3);
        let ram = guest.contents();
        let frozen = live.freeze().unwrap();
        // Everything is written in the pause.
        guest.write([1, 1001], 4);
        let report = frozen.commit().unwrap();
        assert_eq!(report.method, used);
        assert_eq!(report.passes.len(), usize::from(used == Method::PreCopy));
        assert_eq!(report.protected_in_pause, 2 * PAGE);
        assert!(std::fs::read(&path).unwrap() == ram);
        assert_eq!(guest.bitmap().dirty_pages(), 2);
    }
    assert_eq!(Method::PreCopy.to_string(), "pre-copy");
    assert_eq!(
        StopReason::MaxPasses.to_string(),
        "the largest number of passes was made"
    );
}

#[test]
fn progress_that_breaks_in_a_pass_cancels_and_keeps_the_marks() {
    let guest = Emulator::new();
    let dir = tempfile::tempdir().unwrap();
    for pass in 0..3 {
        let calls = AtomicUsize::new(0);
        let writing = Arc::clone(&guest);
        let callback = move |progress: Progress| {
            if progress.done == progress.total {
                writing.write(0..100, 5);
                if calls.fetch_add(1, Ordering::SeqCst) == pass {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        };
        let options = MemoryWriter::options().progress(callback);
        let writer = options
            .open(dir.path().join("full.mem"), SIZE, PAGE)
            .unwrap();
        let live = LiveSnapshot::options().remainder(0).begin(&guest, writer);
        let cancelled = live.map(drop).unwrap_err();
        assert!(matches!(cancelled, LiveError::Write(_)), "{cancelled:?}");
        assert_eq!(guest.bitmap().dirty_pages(), SIZE / PAGE);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
