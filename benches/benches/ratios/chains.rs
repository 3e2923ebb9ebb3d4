//! Opens and maps chains of many images.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, Footer, ImageId, MappedChain};
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use page_reader::{PageReader, PopulatedRanges};
use sparse_file::extents;

use crate::Comparison;
use crate::cases::{Before, Case, LIMIT, OURS, contender};

const PAGE: u64 = 4096;

/// A guest whose pages are not zeros.
struct Ones;

impl PageReader for Ones {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(1);
        Ok(())
    }
}

impl Comparison<'_> {
    /// Compares opening chains of diffs with scattered pages. The limit opens the same files and
    /// reads the same footers or extents, one after the other.
    pub fn chains(&mut self) {
        let diffs = |many| if self.smoke_test { 20 } else { many };
        let (sealed, raw) = (diffs(10_000), diffs(2000));
        let opened = "open a chain of 10,000 packed diffs of 64 GiB";
        let mapped = "map a chain of 10,000 packed diffs of 64 GiB";
        if self.wants(opened) || self.wants(mapped) {
            let paths = self.many(sealed, 64 * self.gib, 16, Layout::Packed);
            let open = |_: &Path| drop(Chain::open_sealed(&paths).unwrap());
            let read = |_: &Path| {
                for path in &paths {
                    Footer::read(&File::open(path).unwrap()).unwrap();
                }
            };
            self.opened(opened, sealed, 0.2, open, read);
            self.mapped(mapped, &Chain::open_sealed(&paths).unwrap());
            remove(&paths);
        }
        let name = "open a chain of 2,000 raw diffs of 4 GiB";
        if self.wants(name) {
            let paths = self.many(raw, 4 * self.gib, 1, Layout::Raw);
            let open = |_: &Path| {
                let mut chain = Chain::open_raw(&paths[0], PAGE).unwrap();
                for path in &paths[1..] {
                    chain.push_raw(path).unwrap();
                }
            };
            let read = |_: &Path| {
                for path in &paths {
                    let file = File::open(path).unwrap();
                    let count = extents(&file).unwrap().map(Result::unwrap).count();
                    assert!(count > 0);
                }
            };
            // Checking whether the file system's holes are reliable takes calls that the limit does
            // not make.
            self.opened(name, raw, 0.05, open, read);
            remove(&paths);
        }
    }

    fn mapped(&mut self, name: &str, chain: &Chain) {
        if !self.wants(name) {
            return;
        }
        let start = Instant::now();
        let ram = MappedChain::open(chain).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let runs = chain.stored_runs().count();
        let value = format!("{seconds:.2} s, {runs} runs, {} bytes copied", ram.copied());
        self.figure(name, value, "20 us a run");
    }

    fn opened(
        &mut self,
        name: &str,
        images: u64,
        goal: f64,
        open: impl Fn(&Path),
        read: impl Fn(&Path),
    ) {
        let case = Case {
            name: name.into(),
            group: "read",
            bytes: images * PAGE,
            before: Before::Nothing,
            contenders: vec![contender(OURS, open), contender(LIMIT, read)],
        };
        self.run(&case, &[(LIMIT, goal)]);
    }

    /// Writes a full image of zeros, and diffs of `pages` pages each.
    fn many(&self, diffs: u64, ram_size: u64, pages: u64, layout: Layout) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        let mut parent: Option<ImageId> = None;
        for number in 0..=diffs {
            let path = self.place.join(format!("{number}.mem"));
            let seal = parent.map_or(Seal::new(), |id| Seal::new().parent(id));
            let mut writer = MemoryWriter::options()
                .layout(layout)
                .seal(seal)
                .durability(Durability::None)
                .skip_untouched(true)
                .open(&path, ram_size, PAGE)
                .unwrap();
            if number == 0 {
                writer.write_full(&Untouched).unwrap();
            } else {
                let dirty = DirtyBitmap::new(0, ram_size, PAGE).unwrap();
                for index in 0..pages {
                    let page = (number * pages + index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    dirty.mark_page(page % (ram_size / PAGE)).unwrap();
                }
                writer.write_diff(&Ones, &dirty).unwrap();
            }
            parent = writer.image_id();
            writer.commit().unwrap();
            paths.push(path);
        }
        paths
    }
}

/// A guest whose pages were never touched.
struct Untouched;

impl PageReader for Untouched {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn populated(&self, _: Range<u64>) -> PopulatedRanges<'_> {
        Box::new(std::iter::empty())
    }
}

fn remove(paths: &[PathBuf]) {
    paths
        .iter()
        .for_each(|path| std::fs::remove_file(path).unwrap());
}
