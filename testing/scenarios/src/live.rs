//! Commits of the RAM of a guest that runs.

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use anyhow::{Context, ensure};
use dirty_bitmap::ParentImage;
use guest_ram::GuestRam;
use live_snapshot::{LiveSnapshot, LiveSnapshotOptions, LiveTracker, Method, UffdTracker};
use memory_image::Image;
use memory_writer::{Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::{PageReader, RamLayout};

use super::commits::{DEST, RAM, full, replaced};
use super::{Scenario, images};
use crate::child::PAGE;
use crate::ram::Stamped;

/// The version of the RAM after the point in time of each snapshot. No image may have it.
const LATER: u32 = 9;

pub const LIVE: Scenario = Scenario {
    name: "live",
    about: "live snapshots of a guest that then overwrites all of its RAM",
    prepare: |dir| full(dir, 1),
    act: |dir, observer| {
        let guest = Guest::start()?;
        for stamp in [2, 3] {
            guest.write(0..RAM, stamp)?;
            let options = LiveSnapshot::options().method(Method::CopyOnWrite);
            guest.save(&dir.join(DEST), &options, MemoryWriter::options())?;
            observer.returned()?;
        }
        Ok(())
    },
    check: |after| replaced(after, 1, 3),
};

pub const LIVE_PRECOPY: Scenario = Scenario {
    name: "live-pre-copy",
    about: "a live snapshot by pre-copy of a guest that overwrites all of its RAM in each pass",
    prepare: |dir| full(dir, 1),
    act: |dir, observer| {
        let guest = Guest::start()?;
        guest.write(0..RAM, LATER)?;
        let (ram, frozen) = (Arc::clone(&guest.ram), Arc::clone(&guest.frozen));
        let writer = MemoryWriter::options().progress(move |_| {
            if !frozen.load(SeqCst) {
                // The check finds the later version in the image if this fails.
                let _ = ram.write_at(0, &Stamped::new(2, RAM).bytes(0..RAM));
            }
            ControlFlow::Continue(())
        });
        let options = LiveSnapshot::options().method(Method::PreCopy);
        let options = options.remainder(PAGE).max_passes(3);
        guest.save(&dir.join(DEST), &options, writer)?;
        observer.returned()
    },
    check: |after| replaced(after, 1, 2),
};

pub const LIVE_DIFF: Scenario = Scenario {
    name: "live-diff",
    about: "a sealed live diff over another, then a live full image beside them",
    prepare: images::SEALED.prepare,
    act: |dir, observer| {
        let [full, diff] = images::chain_in(dir);
        let parent = Image::open(full)?.id().context("it is sealed")?;
        let guest = Guest::start()?;
        guest.write(0..RAM, 1)?;
        guest
            .tracker
            .set_baseline(ParentImage::Id(parent.to_bytes()))?;
        for run in images::dirty(3)?.runs() {
            guest.write(run, 3)?;
        }
        let sealed = MemoryWriter::options().layout(Layout::Sealed);
        let writer = sealed.clone().seal(Seal::new().parent(parent));
        guest.save(&diff, &LiveSnapshot::options().diff(true), writer)?;
        observer.returned()?;
        guest.write(0..RAM, 4)?;
        let next = images::next_in(dir);
        guest.save(&next, &LiveSnapshot::options(), sealed.seal(Seal::new()))?;
        observer.returned()
    },
    check: images::SEALED.check,
};

/// A guest whose RAM this thread writes.
struct Guest {
    ram: Arc<GuestRam>,
    tracker: Arc<UffdTracker>,
    /// Whether the point in time of a snapshot is over.
    frozen: Arc<AtomicBool>,
}

impl Guest {
    fn start() -> anyhow::Result<Self> {
        let ram = Arc::new(GuestRam::new(RamLayout::single(0, RAM)?)?);
        let tracker = UffdTracker::options().page_size(PAGE).start(&ram)?;
        Ok(Self {
            ram,
            tracker: Arc::new(tracker),
            frozen: Arc::default(),
        })
    }

    fn write(&self, range: Range<u64>, stamp: u32) -> anyhow::Result<()> {
        let bytes = Stamped::new(stamp, RAM).bytes(range.clone());
        Ok(self.ram.write_at(range.start, &bytes)?)
    }

    /// Takes a snapshot, overwrites all of the RAM after its point in time, and checks that the
    /// guest and the marks are as they should be, also after a failure.
    fn save(
        &self,
        dest: &Path,
        options: &LiveSnapshotOptions,
        writer: MemoryWriterOptions,
    ) -> anyhow::Result<()> {
        let saved = self.commit(dest, options, writer);
        // Writes each page, so that a page without a mark is one that did not fault.
        self.write(0..RAM, LATER)?;
        let mut found = vec![0; usize::try_from(RAM)?];
        self.ram.read_at(0, &mut found)?;
        let kept = found == Stamped::new(LATER, RAM).bytes(0..RAM);
        ensure!(kept, "the guest lost a write: {saved:?}");
        let bitmap = self.tracker.bitmap();
        // A tracker whose handler has failed refuses the next snapshot.
        let marked = bitmap.dirty_pages() == RAM / PAGE || self.tracker.begin_epoch().is_err();
        ensure!(marked, "marks were lost: {saved:?}");
        saved
    }

    fn commit(
        &self,
        dest: &Path,
        options: &LiveSnapshotOptions,
        writer: MemoryWriterOptions,
    ) -> anyhow::Result<()> {
        let writer = writer.open(dest, RAM, PAGE)?;
        let frozen = options.begin(&self.tracker, writer)?.freeze()?;
        self.frozen.store(true, SeqCst);
        self.write(0..RAM, LATER)?;
        frozen.commit()?;
        Ok(())
    }
}
