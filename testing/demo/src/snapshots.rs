//! Taking the snapshots: a full one while the guest works, then diffs, each with the vCPU state of
//! the same instant.
//!
//! The guest is paused for what must be of one instant: the copy of its dirty pages and its
//! processor. It works on while the files become durable, and its dirty pages count as saved only
//! then.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use atomic_file::{AtomicGroup, AtomicWriter};
use dirty_bitmap::TakenBitmap;
use guests::guest::{Epoch, Guest, Tracker};
use memory_writer::{CancelToken, MemoryWriter};

use super::picture::Picture;
use super::report::{Progress, Snapshot};
use super::restore::{Diff, Files};

/// How long a guest idles after each spell of work while it is being copied whole. One that never
/// does dirties its RAM as fast as a disk takes it.
const IDLE: Duration = Duration::from_millis(20);

/// Takes the snapshots of one guest.
pub(crate) struct Snapshots<'a> {
    tracker: Arc<dyn Tracker>,
    dir: &'a Path,
    progress: &'a Progress,
    pub files: Files,
    pub table: Vec<Snapshot>,
    pub picture: Picture,
    /// The last snapshot, while it is committed.
    committing: Committing,
}

/// The commit in progress, if any. Dropping it waits for the commit, so that no writer is left when
/// the directory is removed.
#[derive(Default)]
struct Committing(Option<JoinHandle<anyhow::Result<Snapshot>>>);

impl Drop for Committing {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            let _ = thread.join();
        }
    }
}

impl<'a> Snapshots<'a> {
    pub(crate) fn new(
        tracker: Arc<dyn Tracker>,
        dir: &'a Path,
        picture: Picture,
        progress: &'a Progress,
    ) -> Self {
        Self {
            tracker,
            dir,
            progress,
            files: Files::default(),
            table: Vec::new(),
            picture,
            committing: Committing::default(),
        }
    }

    /// Takes a full snapshot while the guest runs, `spell` steps at a time.
    pub(crate) fn full(&mut self, guest: &mut dyn Guest, spell: u64) -> anyhow::Result<()> {
        let started = Instant::now();
        let (ram, tracker) = (guest.ram(), Arc::clone(&self.tracker));
        let (size, page) = (tracker.dirty().ram_size(), tracker.dirty().page_size());
        let phase = "full snapshot of the working guest";
        self.progress.phase(phase, size);
        let mut writer = self.writer("full.mem")?;

        // The epoch begins with what the copy is sure to have; what the guest writes from here on
        // joins it.
        let mut epoch = tracker.begin()?;
        let progress = self.progress;
        let mut copy = || {
            writer.write_full(&ram)?;
            // Write what was dirtied during the last pass, as long as that gets less. The rest is
            // written in the pause.
            let (mut again, mut before) = (0, size);
            loop {
                let more = tracker.extend(&mut epoch)?;
                let bytes = more.dirty_bytes();
                progress.phase(phase, bytes);
                again += writer.write_diff(&ram, more)?;
                if bytes >= before / 2 {
                    return anyhow::Ok(again);
                }
                before = bytes;
            }
        };
        let again = thread::scope(|scope| {
            let copying = scope.spawn(&mut copy);
            loop {
                guest.work_until(guest.steps() + spell)?;
                if copying.is_finished() {
                    return joined(copying.join());
                }
                thread::sleep(IDLE);
            }
        })?;

        guest.pause()?;
        let paused = Instant::now();
        // First: to capture it may write to the guest's memory.
        let processor = guest.processor()?;
        let rest = tracker.extend(&mut epoch)?;
        let last = writer.write_diff(&ram, rest)?;
        let written = size + (again + last) * page;
        let snapshot = self.snapshot("full", epoch.bitmap(), written, paused);
        self.files.full = writer.dest_path().to_owned();
        self.commit(started, snapshot, writer, epoch, processor)
    }

    /// A diff of what the guest wrote since the snapshot before.
    pub(crate) fn diff(&mut self, guest: &mut dyn Guest, round: u64) -> anyhow::Result<()> {
        self.settle()?;
        guest.pause()?;
        let started = Instant::now();
        let mut writer = self.writer(&format!("diff-{round}.mem"))?;
        let processor = guest.processor()?;
        let epoch = self.tracker.begin()?;
        let pages = writer.write_diff(&guest.ram(), epoch.bitmap())?;
        let written = pages * self.tracker.dirty().page_size();
        let name = format!("diff {round}");
        let snapshot = self.snapshot(&name, epoch.bitmap(), written, started);
        self.files.diffs.push(Diff {
            path: writer.dest_path().to_owned(),
            pages: epoch.bitmap().runs().collect(),
        });
        self.commit(started, snapshot, writer, epoch, processor)
    }

    /// Waits until the last snapshot is durable.
    pub(crate) fn settle(&mut self) -> anyhow::Result<()> {
        if let Some(committing) = self.committing.0.take() {
            self.table.push(joined(committing.join())?);
        }
        Ok(())
    }

    fn writer(&mut self, name: &str) -> anyhow::Result<MemoryWriter> {
        let path = self.dir.join(name);
        let dirty = self.tracker.dirty();
        let (size, page) = (dirty.ram_size(), dirty.page_size());
        let progress = self.progress.clone();
        let cancel = CancelToken::new();
        let writer = MemoryWriter::options()
            // The pages of each diff are listed in `files`.
            .allow_ambiguous_diff(true)
            .cancel(cancel.clone())
            .progress(move |done| {
                if progress.at(done.done).is_err() {
                    cancel.cancel();
                }
                std::ops::ControlFlow::Continue(())
            })
            .open(&path, size, page)?;
        Ok(writer)
    }

    /// The row of the picture, and of the table as far as it is known.
    fn snapshot(
        &mut self,
        name: &str,
        dirty: &TakenBitmap,
        written: u64,
        paused: Instant,
    ) -> Snapshot {
        self.picture.add(name, dirty);
        Snapshot {
            name: name.to_owned(),
            ram: dirty.ram_size(),
            dirty_pages: dirty.dirty_bytes() / dirty.page_size(),
            written,
            allocated: 0,
            paused: paused.elapsed(),
            durable: Duration::ZERO,
        }
    }

    /// Makes the files durable while the guest works on. The pages count as saved only once they
    /// are.
    fn commit(
        &mut self,
        started: Instant,
        mut snapshot: Snapshot,
        writer: MemoryWriter,
        epoch: Epoch,
        processor: Vec<u8>,
    ) -> anyhow::Result<()> {
        let memory = writer.dest_path().to_owned();
        let state = memory.with_extension("vcpu");
        self.files.processor.clone_from(&state);
        let commit = move || {
            let mut file = AtomicWriter::open(&state)?;
            file.write_all(&processor)?;
            let mut group = AtomicGroup::new();
            group.add(writer.finish()?)?;
            group.add(file)?;
            group.commit()?;
            epoch.release()?;
            snapshot.durable = started.elapsed();
            snapshot.allocated = fs::metadata(&memory)?.blocks() * 512;
            Ok(snapshot)
        };
        let thread = thread::Builder::new().name("commit".into());
        self.committing = Committing(Some(thread.spawn(commit)?));
        Ok(())
    }
}

/// What a thread returned; its panic as an error.
pub(crate) fn joined<T>(result: thread::Result<anyhow::Result<T>>) -> anyhow::Result<T> {
    result.unwrap_or_else(|_| Err(anyhow!("a thread of the demo panicked")))
}
