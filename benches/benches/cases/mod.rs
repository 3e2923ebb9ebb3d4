//! The measured cases: the same work done by this project, by its peers, and by a writer that does
//! nothing else.

pub mod ram;
pub mod raw;

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use benches::scattered;
use dirty_bitmap::DirtyBitmap;
use memory_writer::{MemoryWriter, MemoryWriterOptions};
use vm_memory::{Bytes, GuestAddress};

use ram::Ram;

/// The names of the contenders.
pub const OURS: &str = "ramsnap";
pub const SQUIB: &str = "squib-snapshot";
pub const VM_MEMORY: &str = "vm-memory";
pub const LIMIT: &str = "raw limit";

/// The destination before each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    Nothing,
    /// The file that this contender wrote in the previous run.
    Previous,
}

/// A snapshot of some pages, by several contenders.
pub struct Case<'a> {
    pub name: String,
    pub group: &'static str,
    pub bytes: u64,
    pub before: Before,
    pub contenders: Vec<Contender<'a>>,
}

pub struct Contender<'a> {
    pub name: &'static str,
    /// Writes to a path, and returns the time.
    pub run: Box<dyn Fn(&Path) -> Duration + 'a>,
}

pub fn contender<'a>(name: &'static str, run: impl Fn(&Path) + 'a) -> Contender<'a> {
    Contender {
        name,
        run: Box::new(move |dest| {
            let start = Instant::now();
            run(dest);
            start.elapsed()
        }),
    }
}

impl Case<'_> {
    /// Prepares and returns the destination of a contender.
    pub fn destination(&self, place: &Path, contender: usize) -> PathBuf {
        let dir = place.join(contender.to_string());
        if self.before == Before::Nothing {
            let _ = fs::remove_dir_all(&dir);
        }
        fs::create_dir_all(&dir).unwrap();
        dir.join("guest.mem")
    }
}

/// The pattern of the pages that a guest wrote.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// In runs of 64 pages.
    Clustered,
    Random,
}

/// Both bitmaps with the same dirty pages, and their runs.
pub struct Dirty {
    pub ours: DirtyBitmap,
    pub squib: squib_snapshot::DirtyBitmap,
    pub runs: Vec<Range<u64>>,
    pub page: u64,
}

impl Dirty {
    /// Marks one in `one_in` pages of `page` bytes.
    pub fn new(size: u64, page: u64, one_in: u64, pattern: Pattern) -> Self {
        let (pages, count) = (size / page, size / page / one_in);
        const CLUSTER: u64 = 64;
        let dirty: Vec<u64> = match pattern {
            Pattern::Random => scattered(count, pages),
            Pattern::Clustered => scattered(count.div_ceil(CLUSTER), pages / CLUSTER)
                .into_iter()
                .flat_map(|cluster| cluster * CLUSTER..(cluster + 1) * CLUSTER)
                .collect(),
        };
        let ours = DirtyBitmap::new(0, size, page).unwrap();
        let squib = squib_snapshot::DirtyBitmap::new(0, size, page).unwrap();
        for page in dirty {
            ours.mark_page(page).unwrap();
            squib.set_dirty_by_index(page);
        }
        let runs = ours.runs().collect();
        Self {
            ours,
            squib,
            runs,
            page,
        }
    }
}

const FILE_PAGE: u64 = 16 << 10;

/// Returns the case of a full dump. `options` apply to this project's writer.
pub fn full<'a>(ram: &'a Ram, name: &str, options: fn() -> MemoryWriterOptions) -> Case<'a> {
    let size = ram.size;
    Case {
        name: name.into(),
        group: "full",
        bytes: size,
        before: Before::Nothing,
        contenders: vec![
            contender(OURS, move |dest| {
                let mut writer = options().open(dest, size, FILE_PAGE).unwrap();
                writer.write_full(&ram.reader()).unwrap();
                writer.commit().unwrap();
            }),
            contender(SQUIB, move |dest| {
                let mut writer = squib_snapshot::MemoryWriter::open(dest, size, FILE_PAGE).unwrap();
                writer.write_full(ram).unwrap();
                writer.commit().unwrap();
            }),
            contender(VM_MEMORY, move |dest| {
                let stage = dest.with_extension("stage");
                let file = File::create(&stage).unwrap();
                ram.memory
                    .write_all_volatile_to(GuestAddress(0), &mut &file, size as usize)
                    .unwrap();
                durable(&file, &stage, dest);
            }),
            contender(LIMIT, move |dest| {
                raw::fresh(dest, size, &[0..size], &ram.reader());
            }),
        ],
    }
}

/// Returns the case of a full dump over the previous one, whose file this project's writer
/// recycles.
pub fn recycled<'a>(ram: &'a Ram, name: &str) -> Case<'a> {
    let size = ram.size;
    let mut case = full(ram, name, || MemoryWriter::options().recycle(u64::MAX));
    case.before = Before::Previous;
    case.contenders.retain(|contender| contender.name != LIMIT);
    case.contenders.push(contender(LIMIT, move |dest| {
        if dest.exists() {
            raw::overwrite(dest, &[0..size], &ram.reader());
        } else {
            raw::fresh(dest, size, &[0..size], &ram.reader());
        }
    }));
    case
}

/// Returns the case of a diff in the raw layout.
pub fn diff<'a>(ram: &'a Ram, dirty: &'a Dirty, name: &str) -> Case<'a> {
    let (size, page) = (ram.size, dirty.page);
    Case {
        name: name.into(),
        group: "diff",
        bytes: dirty.ours.dirty_bytes(),
        before: Before::Nothing,
        contenders: vec![
            contender(OURS, move |dest| {
                let mut writer = MemoryWriter::open(dest, size, page).unwrap();
                writer.write_diff(&ram.reader(), &dirty.ours).unwrap();
                writer.commit().unwrap();
            }),
            contender(SQUIB, move |dest| {
                let mut writer = squib_snapshot::MemoryWriter::open(dest, size, page).unwrap();
                writer.write_diff(ram, &dirty.squib).unwrap();
                writer.commit().unwrap();
            }),
            contender(LIMIT, move |dest| {
                raw::fresh(dest, size, &dirty.runs, &ram.reader());
            }),
        ],
    }
}

fn durable(file: &File, stage: &Path, dest: &Path) {
    file.sync_all().unwrap();
    fs::rename(stage, dest).unwrap();
    let dir = File::open(dest.parent().unwrap()).unwrap();
    dir.sync_all().unwrap();
}
