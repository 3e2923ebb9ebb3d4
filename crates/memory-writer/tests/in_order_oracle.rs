//! Compares writes in the order of the caller with ordinary writes, for any order of runs.

mod support;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{
    Durability, Engine, Layout, MemoryWriter, MemoryWriterOptions, PageRun, Seal, SnapshotError,
};
use page_reader::{HostMemory, PageReader};
use proptest::prelude::*;
use support::Place;
use support::images::{PAGE, applied};

/// Fewer pages than three chunks of 1 MiB have, whose checksums a sealed image has.
const MAX_PAGES: usize = 600;

/// RAM that records the reads of it. Its memory must not be used.
struct Recorded<'r> {
    ram: &'r [u8],
    reads: Mutex<Vec<Range<u64>>>,
}

impl<'r> Recorded<'r> {
    fn new(ram: &'r [u8]) -> Self {
        Self {
            ram,
            reads: Mutex::default(),
        }
    }

    /// Checks that each byte of the runs was read once, in their order.
    fn assert_read(&self, runs: &[Range<u64>]) {
        let joined = |runs: &[Range<u64>]| {
            let mut joined: Vec<Range<u64>> = Vec::new();
            for run in runs {
                match joined.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => joined.push(run.clone()),
                }
            }
            joined
        };
        let reads = self.reads.lock().unwrap();
        assert!(joined(&reads) == joined(runs), "{reads:x?} {runs:x?}");
    }
}

impl PageReader for Recorded<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let read = offset..offset + buf.len() as u64;
        self.reads.lock().unwrap().push(read);
        self.ram.read_at(offset, buf)
    }

    fn host_memory(&self, _: u64, _: usize) -> Option<HostMemory<'_>> {
        panic!("the memory is used")
    }
}

/// RAM, and the runs of its pages in the order of the write.
#[derive(Clone, Debug)]
struct Case {
    layout: Layout,
    engine: Engine,
    buffer: usize,
    ram: Vec<u8>,
    runs: Vec<PageRun>,
}

impl Case {
    fn options(&self) -> MemoryWriterOptions {
        MemoryWriter::options()
            .layout(self.layout)
            .durability(Durability::None)
            .allow_ambiguous_diff(true)
            .chunk_size(self.buffer)
    }

    fn data(&self) -> Vec<Range<u64>> {
        let runs = self.runs.iter();
        let data = runs.filter_map(|run| match run {
            PageRun::Data(run) => Some(run.clone()),
            PageRun::Zeros(_) => None,
        });
        data.collect()
    }

    /// Returns the RAM after the image at `path` is applied to `before`.
    fn restored(&self, path: &Path, before: &[u8]) -> Vec<u8> {
        match self.layout {
            Layout::Raw => {
                let image = std::fs::read(path).unwrap();
                let mut ram = before.to_vec();
                for run in &self.runs {
                    let (PageRun::Data(run) | PageRun::Zeros(run)) = run;
                    let bytes = run.start as usize..run.end as usize;
                    ram[bytes.clone()].copy_from_slice(&image[bytes]);
                }
                ram
            }
            Layout::Sealed | Layout::Packed => applied(path, before.to_vec()).1,
        }
    }
}

/// What a page is: zeros that are listed, zeros that are read, or other bytes.
fn case() -> impl Strategy<Value = Case> {
    let page = (0..4_u8, prop::bool::weighted(0.2), any::<u32>());
    (
        prop::sample::select(Layout::ALL.to_vec()),
        prop::sample::select(Engine::ALL.to_vec()),
        prop::sample::select(vec![4096, 20_000, 1 << 20]),
        prop::collection::vec(page, 1..MAX_PAGES),
    )
        .prop_map(|(layout, engine, buffer, pages)| {
            let mut ram = vec![0; pages.len() * PAGE as usize];
            let mut runs: Vec<(u32, bool, Range<u64>)> = Vec::new();
            for (page, (kind, cut, key)) in pages.into_iter().enumerate() {
                let start = page as u64 * PAGE;
                if kind > 1 {
                    ram[start as usize..][..PAGE as usize].fill(page as u8 | 1);
                }
                let listed = kind == 0;
                match runs.last_mut() {
                    Some((_, zeros, run)) if *zeros == listed && !cut => run.end += PAGE,
                    _ => runs.push((key, listed, start..start + PAGE)),
                }
            }
            runs.sort_by_key(|(key, ..)| *key);
            let run = |(_, zeros, run)| match zeros {
                true => PageRun::Zeros(run),
                false => PageRun::Data(run),
            };
            Case {
                layout,
                engine,
                buffer,
                ram,
                runs: runs.into_iter().map(run).collect(),
            }
        })
}

/// Opens a writer, by the engine of the case if this machine has it.
fn open(case: &Case, path: &Path) -> MemoryWriter {
    let options = case.options().engine(case.engine);
    options.open(path, case.ram.len() as u64, PAGE).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(24, 400)))]

    #[test]
    fn full_image_is_the_same_in_any_order(case in case()) {
        let place = Place::new();
        let reader = Recorded::new(&case.ram);
        let mut writer = open(&case, &place.dest);
        match writer.write_full_in_order(&reader, case.runs.clone()) {
            Err(SnapshotError::MemoryIo { source, .. }) if source.kind() == io::ErrorKind::Unsupported => return Ok(()),
            written => written.unwrap(),
        }
        writer.commit().unwrap();
        reader.assert_read(&case.data());
        prop_assert!(case.restored(&place.dest, &vec![0xee; case.ram.len()]) == case.ram);
        place.assert_nothing_else();
    }

    /// The pages of data are dirty, and the others are clean.
    #[test]
    fn diff_is_the_same_in_any_order(case in case()) {
        let place = Place::new();
        let size = case.ram.len() as u64;
        let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
        let data = case.data();
        for run in &data {
            dirty.mark_range(run.start, run.end - run.start).unwrap();
        }
        let seal = || match case.layout {
            Layout::Raw => Seal::new(),
            Layout::Sealed | Layout::Packed => Seal::new().on_raw_image(),
        };
        let reader = Recorded::new(&case.ram);
        let options = case.options().engine(case.engine).seal(seal());
        let mut writer = options.open(&place.dest, size, PAGE).unwrap();
        let pages = match writer.write_diff_in_order(&reader, &dirty, data.clone()) {
            Err(SnapshotError::MemoryIo { source, .. }) if source.kind() == io::ErrorKind::Unsupported => return Ok(()),
            written => written.unwrap(),
        };
        prop_assert_eq!(pages, dirty.dirty_pages());
        let epoch = dirty.begin_epoch().unwrap();
        // The marks are those of an epoch that began later, so they were not all written.
        prop_assert_eq!(writer.commit_and_release(epoch).is_ok(), false);
        let mut writer = options.open(&place.dest, size, PAGE).unwrap();
        let epoch = dirty.begin_epoch().unwrap();
        writer.write_diff_in_order(&*case.ram, epoch.bitmap(), data.clone()).unwrap();
        writer.commit_and_release(epoch).unwrap();
        reader.assert_read(&data);
        let other = place.path().join("ordinary.mem");
        let mut writer = case.options().seal(seal()).open(&other, size, PAGE).unwrap();
        let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
        for run in &data {
            dirty.mark_range(run.start, run.end - run.start).unwrap();
        }
        writer.write_diff(&*case.ram, &dirty).unwrap();
        writer.commit().unwrap();
        let before = vec![0xee; case.ram.len()];
        let case = Case { runs: data.into_iter().map(PageRun::Data).collect(), ..case };
        prop_assert!(case.restored(&place.dest, &before) == case.restored(&other, &before));
    }
}
