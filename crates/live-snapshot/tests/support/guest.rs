//! A guest whose vCPUs are threads of this process.

#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::{self, JoinHandle};

use dirty_bitmap::Policy;
use live_snapshot::{LiveTracker, UffdTracker};
use memory_image::{Chain, Image};
use memory_writer::{Durability, ImageId, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;
use random::Random;

use crate::memory::{Kind, Memory};

pub(crate) const PAGE: u64 = 4096;

/// A guest with vCPU threads that write its RAM at random places.
pub(crate) struct Guest {
    // Stopped first.
    vcpus: Vcpus,
    pub(crate) tracker: Arc<UffdTracker>,
    pub(crate) memory: Arc<Memory>,
}

struct Vcpus(Vec<JoinHandle<()>>, Arc<State>);

struct State {
    /// Held for reading while a vCPU runs, and for writing in a pause.
    running: RwLock<()>,
    stop: AtomicBool,
    writes: AtomicU64,
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.1.stop.store(true, Ordering::SeqCst);
        for vcpu in self.0.drain(..) {
            let _ = vcpu.join();
        }
    }
}

impl Guest {
    /// Creates a guest of private memory whose write faults unprotect one page each.
    pub(crate) fn private(size: u64) -> Self {
        Self::with_policy(Kind::Private, size, Policy::Pages)
    }

    /// Creates a guest without vCPUs.
    pub(crate) fn with_policy(kind: Kind, size: u64, policy: Policy) -> Self {
        let memory = Arc::new(Memory::new(kind, size));
        let options = UffdTracker::options().policy(policy);
        let tracker = options.page_size(kind.page_size()).start(&memory.ram);
        let state = State {
            running: RwLock::new(()),
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        };
        Self {
            vcpus: Vcpus(Vec::new(), Arc::new(state)),
            tracker: Arc::new(tracker.unwrap()),
            memory,
        }
    }

    /// Fills the RAM with bytes that differ in each page.
    pub(crate) fn fill(&self) {
        self.write_pages(0..self.size() / PAGE, 0x5a5a);
    }

    /// Writes a word to each page.
    pub(crate) fn write_pages(&self, pages: impl IntoIterator<Item = u64>, seed: u64) {
        for page in pages {
            self.write(page * PAGE + page % 500 * 8, page << 32 ^ seed);
        }
    }

    /// Writes a word at an offset, as the host.
    pub(crate) fn write(&self, offset: u64, word: u64) {
        self.memory
            .ram
            .write_at(offset, &word.to_ne_bytes())
            .unwrap();
    }

    /// Starts a vCPU that writes words at random offsets below `end`.
    pub(crate) fn run_vcpu(&mut self, seed: u64, end: u64) {
        let memory = Arc::clone(&self.memory);
        let mut random = Random::seeded(seed);
        self.run(move || {
            let word = random.number().to_ne_bytes();
            memory
                .ram
                .write_at(random.below(end / 8) * 8, &word)
                .unwrap();
        });
    }

    /// Starts a device that reads a file into the RAM, by the kernel.
    pub(crate) fn run_device(&mut self, seed: u64) {
        let memory = Arc::clone(&self.memory);
        let mut random = Random::seeded(seed);
        // A raw diff of every page is ambiguous.
        let pages = self.size() / PAGE / 4 * 3;
        let program = File::open(std::env::current_exe().unwrap()).unwrap();
        self.run(move || {
            let (at, page) = (random.below(500_000), random.below(pages));
            memory.read_from(&program, at, page * PAGE + 100, 512);
        });
    }

    fn run(&mut self, mut step: impl FnMut() + Send + 'static) {
        let state = Arc::clone(&self.vcpus.1);
        self.vcpus.0.push(thread::spawn(move || {
            while !state.stop.load(Ordering::SeqCst) {
                let running = state.running.read().unwrap();
                for _ in 0..16 {
                    step();
                    state.writes.fetch_add(1, Ordering::SeqCst);
                }
                drop(running);
                thread::yield_now();
            }
        }));
    }

    /// Waits until the vCPUs have made this many more writes.
    pub(crate) fn wait_for_writes(&self, count: u64) {
        let writes = &self.vcpus.1.writes;
        let end = writes.load(Ordering::SeqCst) + count;
        while writes.load(Ordering::SeqCst) < end {
            thread::yield_now();
        }
    }

    /// Calls `paused` while no vCPU runs.
    pub(crate) fn pause<T>(&self, paused: impl FnOnce() -> T) -> T {
        let _paused = self.vcpus.1.running.write().unwrap();
        paused()
    }

    /// Returns the bytes of the RAM.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size() as usize];
        self.memory.ram.read_at(0, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn size(&self) -> u64 {
        self.memory.ram.layout().ram_size()
    }

    /// Returns the pages that are marked.
    pub(crate) fn dirty(&self) -> BTreeSet<u64> {
        let runs = self.tracker.bitmap().runs();
        runs.flat_map(|run: Range<u64>| run.start / PAGE..run.end.div_ceil(PAGE))
            .collect()
    }
}

/// A chain of images in a directory of its own.
pub(crate) struct Images {
    dir: tempfile::TempDir,
    layout: Layout,
    size: u64,
    page_size: u64,
    opened: u32,
    paths: Vec<PathBuf>,
    newest: Option<ImageId>,
}

impl Images {
    pub(crate) fn new(layout: Layout, size: u64) -> Self {
        Self::with_pages(layout, size, PAGE)
    }

    pub(crate) fn with_pages(layout: Layout, size: u64, page_size: u64) -> Self {
        Self {
            page_size,
            dir: tempfile::tempdir().unwrap(),
            layout,
            size,
            opened: 0,
            paths: Vec::new(),
            newest: None,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the id of the newest image.
    pub(crate) fn newest(&self) -> Option<ImageId> {
        self.newest
    }

    /// Returns the length of the newest file in bytes.
    pub(crate) fn newest_len(&self) -> u64 {
        std::fs::metadata(self.paths.last().unwrap()).unwrap().len()
    }

    /// Opens a writer of the next image: a full one, or a diff on top of the newest one.
    pub(crate) fn next(&mut self, diff: bool) -> MemoryWriter {
        let options = MemoryWriter::options().durability(Durability::None);
        self.next_by(diff, options)
    }

    pub(crate) fn next_by(&mut self, diff: bool, options: MemoryWriterOptions) -> MemoryWriter {
        let path = self.dir.path().join(format!("{}.mem", self.opened));
        self.opened += 1;
        let seal = match (diff, self.newest) {
            (true, Some(parent)) => Seal::new().parent(parent),
            _ => Seal::new(),
        };
        if !diff {
            self.paths.clear();
        }
        let options = options.layout(self.layout).seal(seal);
        let writer = options.open(&path, self.size, self.page_size).unwrap();
        self.paths.push(path);
        self.newest = writer.image_id();
        writer
    }

    /// Removes the newest image from the chain: it was not committed.
    pub(crate) fn forget(&mut self, newest: Option<ImageId>) {
        let path = self.paths.pop().unwrap();
        assert!(!path.exists());
        self.newest = newest;
    }

    /// Returns the RAM that the images hold, and checks their checksums.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let (first, diffs) = self.paths.split_first().unwrap();
        let mut chain = match self.layout {
            Layout::Raw => Chain::open_raw(first, self.page_size).unwrap(),
            Layout::Sealed | Layout::Packed => Chain::open(first, self.page_size).unwrap(),
        };
        for diff in diffs {
            match self.layout {
                Layout::Raw => chain.push_raw(diff).unwrap(),
                Layout::Sealed | Layout::Packed => chain.push(diff).unwrap(),
            }
        }
        if self.layout != Layout::Raw {
            for path in &self.paths {
                let image = Image::open(path).unwrap();
                let verified = image.verify(&mut |_| std::ops::ControlFlow::Continue(()));
                assert!(verified.unwrap().is_ok());
            }
        }
        let mut bytes = vec![0; self.size as usize];
        chain.read(0, &mut bytes).unwrap();
        bytes
    }
}

/// Compares RAM without printing it.
#[track_caller]
pub(crate) fn assert_same(image: &[u8], ram: &[u8]) {
    assert_eq!(image.len(), ram.len());
    let differ = (0..ram.len() / PAGE as usize).filter(|page| {
        let bytes = page * PAGE as usize..(page + 1) * PAGE as usize;
        image[bytes.clone()] != ram[bytes]
    });
    let pages: Vec<_> = differ.collect();
    assert!(
        pages.is_empty(),
        "{} pages differ: {:?}",
        pages.len(),
        &pages[..pages.len().min(20)]
    );
}
