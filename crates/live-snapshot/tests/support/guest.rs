//! A guest whose vCPUs are threads of this process.

#![allow(dead_code, reason = "each test file uses a part")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::{self, JoinHandle};

use guest_ram::GuestRam;
use live_snapshot::UffdTracker;
use memory_image::Chain;
use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
use page_reader::{PageReader, RamLayout};
use random::Random;

pub(crate) const PAGE: u64 = 4096;

/// A guest with vCPU threads that write its RAM at random places.
pub(crate) struct Guest {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) tracker: Arc<UffdTracker>,
    vcpus: Vec<JoinHandle<()>>,
    state: Arc<State>,
}

struct State {
    /// Held for reading while a vCPU runs, and for writing in a pause.
    running: RwLock<()>,
    stop: AtomicBool,
    writes: AtomicU64,
}

impl Guest {
    /// Creates a guest whose RAM is all written, without vCPUs.
    pub(crate) fn idle(size: u64) -> Self {
        let layout = RamLayout::single(0x4000_0000, size).unwrap();
        let ram: Arc<GuestRam> = Arc::new(GuestRam::new(layout).unwrap());
        let tracker = Arc::new(UffdTracker::start(&ram).unwrap());
        Self {
            ram,
            tracker,
            vcpus: Vec::new(),
            state: Arc::new(State {
                running: RwLock::new(()),
                stop: AtomicBool::new(false),
                writes: AtomicU64::new(0),
            }),
        }
    }

    /// Fills the RAM with bytes that differ in each page.
    pub(crate) fn fill(&self) {
        let size = self.ram.layout().ram_size();
        for page in 0..size / PAGE {
            self.write(page * PAGE, page ^ 0x5a5a);
        }
    }

    /// Writes a word at an offset, as the host.
    pub(crate) fn write(&self, offset: u64, word: u64) {
        self.ram.write_at(offset, &word.to_ne_bytes()).unwrap();
    }

    /// Starts a vCPU that writes words at random offsets below `end`.
    pub(crate) fn run_vcpu(&mut self, seed: u64, end: u64) {
        let (ram, state) = (Arc::clone(&self.ram), Arc::clone(&self.state));
        self.vcpus.push(thread::spawn(move || {
            let mut random = Random::seeded(seed);
            while !state.stop.load(Ordering::SeqCst) {
                let _running = state.running.read().unwrap();
                for _ in 0..16 {
                    let offset = random.below(end / 8) * 8;
                    let word = random.number().to_ne_bytes();
                    ram.write_at(offset, &word).unwrap();
                    state.writes.fetch_add(1, Ordering::SeqCst);
                }
            }
        }));
    }

    /// Waits until the vCPUs have made this many more writes.
    pub(crate) fn wait_for_writes(&self, count: u64) {
        let end = self.state.writes.load(Ordering::SeqCst) + count;
        while self.state.writes.load(Ordering::SeqCst) < end {
            thread::yield_now();
        }
    }

    /// Calls `paused` while no vCPU runs.
    pub(crate) fn pause<T>(&self, paused: impl FnOnce() -> T) -> T {
        let _paused = self.state.running.write().unwrap();
        paused()
    }

    /// Returns the bytes of the RAM.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size() as usize];
        self.ram.read_at(0, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn size(&self) -> u64 {
        self.ram.layout().ram_size()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        for vcpu in self.vcpus.drain(..) {
            let _ = vcpu.join();
        }
    }
}

/// A chain of images in a directory of its own.
pub(crate) struct Images {
    dir: tempfile::TempDir,
    layout: Layout,
    size: u64,
    paths: Vec<PathBuf>,
    newest: Option<ImageId>,
}

impl Images {
    pub(crate) fn new(layout: Layout, size: u64) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            layout,
            size,
            paths: Vec::new(),
            newest: None,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Opens a writer of the next image: a full one, or a diff on top of the newest one.
    pub(crate) fn next(&mut self, diff: bool) -> MemoryWriter {
        let path = self.dir.path().join(format!("{}.mem", self.paths.len()));
        let seal = match (diff, self.newest) {
            (true, Some(parent)) => Seal::new().parent(parent),
            _ => Seal::new(),
        };
        if !diff {
            self.paths.clear();
        }
        self.paths.push(path.clone());
        let options = MemoryWriter::options().layout(self.layout).seal(seal);
        let writer = options.open(&path, self.size, PAGE).unwrap();
        self.newest = writer.image_id();
        writer
    }

    /// Returns the RAM that the images hold.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let (first, diffs) = self.paths.split_first().unwrap();
        let mut chain = match self.layout {
            Layout::Raw => Chain::open_raw(first, PAGE).unwrap(),
            _ => Chain::open(first, PAGE).unwrap(),
        };
        for diff in diffs {
            match self.layout {
                Layout::Raw => chain.push_raw(diff).unwrap(),
                _ => chain.push(diff).unwrap(),
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
