//! Taking the snapshots: a full one while the guest works, then diffs, each with the vCPU state of the same instant.
//!
//! The guest is paused for what must be of one instant: the copy of its dirty pages and its processor. It works on while the
//! files become durable, and its dirty pages count as saved only then.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use atomic_file::{AtomicGroup, AtomicWriter};
use dirty_bitmap::{DirtyBitmap, Epoch};
use memory_writer::MemoryWriter;

use super::guest::Guest;
use super::picture::Picture;
use super::report::{Progress, Snapshot};

/// How long a guest idles after each spell of work while it is being copied whole. One that never does dirties its RAM as fast
/// as a disk takes it.
const IDLE: Duration = Duration::from_millis(20);

/// The files from which a guest can be brought back.
#[derive(Debug, Default)]
pub struct Chain {
    /// Memory files: a full one, then diffs in the order of their making.
    pub memory: Vec<PathBuf>,
    /// The vCPU state at the instant of the last of them.
    pub processor: PathBuf,
}

impl Chain {
    /// Makes an empty guest the one that the chain was taken of.
    pub fn restore(&self, guest: &mut dyn Guest, progress: &Progress) -> anyhow::Result<()> {
        for path in &self.memory {
            use std::os::unix::fs::FileExt;
            let f = std::fs::File::open(path)?;
            let len = f.metadata()?.len();
            progress.phase("restoring", len);
            let mut at = 0;
            while at < len {
                let Ok(s) = nix::unistd::lseek(&f, at as i64, nix::unistd::Whence::SeekData) else {
                    break;
                };
                let e = nix::unistd::lseek(&f, s, nix::unistd::Whence::SeekHole)?;
                let mut b = vec![0; (e - s) as usize];
                f.read_exact_at(&mut b, s as u64)?;
                guest.write(s as u64, &b)?;
                at = e as u64;
            }
        }
        guest.set_processor(&fs::read(&self.processor)?)
    }
}

/// Takes the snapshots of one guest.
pub struct Snapshots<'a> {
    pub dir: &'a Path,
    pub progress: &'a Progress,
    pub chain: Chain,
    pub table: Vec<Snapshot>,
    pub picture: Picture,
    /// The last one, on its way to the medium.
    pub committing: Option<JoinHandle<anyhow::Result<Snapshot>>>,
}

impl<'a> Snapshots<'a> {
    pub fn new(dir: &'a Path, picture: Picture, progress: &'a Progress) -> Self {
        Self {
            dir,
            progress,
            chain: Chain::default(),
            table: Vec::new(),
            picture,
            committing: None,
        }
    }

    /// A full snapshot of a guest that works meanwhile, in spells of `spell` steps.
    pub fn full(&mut self, guest: &mut dyn Guest, spell: u64) -> anyhow::Result<()> {
        let started = Instant::now();
        let ram = guest.ram();
        let size = guest.dirty().ram_size();
        self.progress
            .phase("full snapshot of the working guest", size);
        let mut writer = self.writer(guest, "full.mem")?;

        // The epoch begins with what the copy is sure to have; what the guest writes from here on joins it at the end.
        guest.harvest()?;
        let mut epoch = Epoch::begin(Arc::clone(guest.dirty()))?;
        let copied = AtomicBool::new(false);
        thread::scope(|scope| {
            let working = scope.spawn(|| {
                while !copied.load(Ordering::Acquire) {
                    guest.work_until(guest.steps() + spell)?;
                    thread::sleep(IDLE);
                }
                guest.work_past(guest.steps() + 1)
            });
            let written = writer.write_full(&ram);
            copied.store(true, Ordering::Release);
            written?;
            joined(working.join())
        })?;

        let paused = Instant::now();
        guest.harvest()?;
        let meanwhile = epoch.take_more()?;
        let more = writer.write_diff(&ram, &meanwhile)?;
        let processor = guest.processor()?;
        let mut snapshot = self.snapshot("full", guest, &meanwhile, paused.elapsed());
        snapshot.written = size + more * guest.dirty().page_size();
        self.commit(started, snapshot, writer, epoch, processor)
    }

    /// A diff of the guest, which must be paused.
    pub fn diff(&mut self, guest: &mut dyn Guest, round: u64) -> anyhow::Result<()> {
        self.settle()?;
        let started = Instant::now();
        let mut writer = self.writer(guest, &format!("diff-{round}.mem"))?;
        guest.harvest()?;
        let epoch = Epoch::begin(Arc::clone(guest.dirty()))?;
        let pages = writer.write_diff(&guest.ram(), epoch.bitmap())?;
        let processor = guest.processor()?;
        let name = format!("diff {round}");
        let mut snapshot = self.snapshot(&name, guest, epoch.bitmap(), started.elapsed());
        snapshot.written = pages * guest.dirty().page_size();
        self.commit(started, snapshot, writer, epoch, processor)
    }

    /// Waits until the last snapshot is durable.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        if let Some(committing) = self.committing.take() {
            self.table.push(joined(committing.join())?);
        }
        Ok(())
    }

    fn writer(&mut self, guest: &dyn Guest, name: &str) -> anyhow::Result<MemoryWriter> {
        let path = self.dir.join(name);
        let (size, page) = (guest.dirty().ram_size(), guest.dirty().page_size());
        let progress = self.progress.clone();
        let writer = MemoryWriter::options()
            .progress(move |done| progress.at(done.bytes_done))
            .open(&path, size, page)?;
        self.chain.memory.push(path);
        Ok(writer)
    }

    /// The figures so far, and the row of the picture.
    fn snapshot(
        &mut self,
        name: &str,
        guest: &dyn Guest,
        dirty: &DirtyBitmap,
        paused: Duration,
    ) -> Snapshot {
        self.picture.add(name, dirty);
        Snapshot {
            name: name.to_owned(),
            ram: dirty.ram_size(),
            dirty_pages: dirty.dirty_bytes() / guest.dirty().page_size(),
            written: 0,
            allocated: 0,
            paused,
            durable: Duration::ZERO,
        }
    }

    /// Makes the files durable while the guest works on. The pages count as saved only once they are.
    fn commit(
        &mut self,
        started: Instant,
        mut snapshot: Snapshot,
        writer: MemoryWriter,
        epoch: Epoch<Arc<DirtyBitmap>>,
        processor: Vec<u8>,
    ) -> anyhow::Result<()> {
        let memory = self.chain.memory.last().cloned();
        let memory = memory.context("a snapshot has a memory file")?;
        let state = memory.with_extension("vcpu");
        self.chain.processor.clone_from(&state);
        let commit = move || {
            let mut file = AtomicWriter::open(&state)?;
            file.write_all(&processor)?;
            let mut group = AtomicGroup::new();
            group.add(writer.finish()?)?;
            group.add(file)?;
            group.commit()?;
            epoch.release();
            snapshot.durable = started.elapsed();
            snapshot.allocated = fs::metadata(&memory)?.blocks() * 512;
            Ok(snapshot)
        };
        self.committing = Some(thread::Builder::new().name("commit".into()).spawn(commit)?);
        Ok(())
    }
}

/// What a thread returned; its panic as an error.
pub fn joined<T>(result: thread::Result<anyhow::Result<T>>) -> anyhow::Result<T> {
    result.unwrap_or_else(|_| Err(anyhow!("a thread of the demo panicked")))
}
