//! Writes, verifies and merges sealed and packed images.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lazy_restore::LazyRam;
use memory_image::{Chain, Image, MappedChain};
use memory_writer::{ImageId, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;

use crate::cases::SQUIB;
use crate::cases::ram::{Content, Ram};
use crate::cases::{
    Before, Case, Contender, Dirty, LIMIT, OURS, Pattern, contender, diff, full, raw,
};
use crate::growth::resident;
use crate::{Comparison, bare};

/// The contender of this project, without a footer.
const RAW_LAYOUT: &str = "raw layout";
/// The contender that reads the same bytes with direct I/O and checks none.
const READER: &str = "bare reader";

const PAGE: u64 = 4096;

fn packed() -> MemoryWriterOptions {
    MemoryWriter::options().layout(Layout::Packed)
}

fn sealed() -> MemoryWriterOptions {
    MemoryWriter::options().layout(Layout::Sealed)
}

impl Comparison<'_> {
    pub fn images(&mut self) {
        let ram = Ram::new(self.gib, Content::Random);
        let dirty = Dirty::new(ram.size, PAGE, 100, Pattern::Random);
        let name = "diff 1 % of 1 GiB, 4 KiB random, packed";
        let case = packed_diff(&ram, &dirty, name, Before::Nothing);
        self.run(&case, &[(SQUIB, 4.0), (LIMIT, 0.85)]);
        let name = "diff 1 % of 1 GiB, 4 KiB random, packed over the previous";
        let case = packed_diff(&ram, &dirty, name, Before::Previous);
        self.run(&case, &[(SQUIB, 6.0), (LIMIT, 0.85)]);
        for (what, options) in [
            ("sealed", sealed as fn() -> MemoryWriterOptions),
            ("packed", packed),
        ] {
            let name = format!("full 1 GiB, random bytes, {what}");
            let mut case = full(&ram, &name, options);
            let mut plain = full(&ram, &name, MemoryWriter::options)
                .contenders
                .remove(0);
            plain.name = RAW_LAYOUT;
            case.contenders
                .retain(|contender| contender.name == OURS || contender.name == SQUIB);
            case.contenders.push(plain);
            self.run(&case, &[(RAW_LAYOUT, 1.0 / 1.1)]);
        }
        self.verify(&ram);
        self.merge(&ram);
    }

    /// Measures the time until a guest of 32 GiB has its first page, from ten diffs on a base with
    /// few touched pages.
    pub fn start(&mut self) {
        let name = "first page of a guest of 32 GiB from a chain of 11";
        if !self.wants(name) {
            return;
        }
        let ram = Ram::new(32 * self.gib, Content::Untouched(97));
        let paths = self.chain(&ram, 1000, Pattern::Clustered);
        let first_page = |start: &dyn Fn(Chain) -> Box<dyn PageReader>| {
            let mut times: Vec<f64> = (0..self.rounds)
                .map(|_| {
                    let chain = Chain::open_sealed(&paths).unwrap();
                    let started = Instant::now();
                    let guest = start(chain);
                    guest.read_at(0, &mut [0; PAGE as usize]).unwrap();
                    started.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            times.sort_unstable_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let mapped = first_page(&|chain| Box::new(MappedChain::open(&chain).unwrap()));
        let lazy = first_page(&|chain| Box::new(LazyRam::options().start(chain).unwrap()));
        let value = format!("mapped {mapped:.1} ms, filled lazily {lazy:.1} ms");
        self.figure(name, value, "at most 50 ms");
        for path in paths {
            std::fs::remove_file(path).unwrap();
        }
    }

    /// Writes a packed full image and ten packed diffs of one in `one_in` pages.
    fn chain(&self, ram: &Ram, one_in: u64, pattern: Pattern) -> Vec<PathBuf> {
        let path = |number: u64| self.place.join(format!("{number}.mem"));
        let mut paths = vec![path(0)];
        let mut parent = write(&path(0), packed().skip_untouched(true), ram, None);
        for number in 1..=10 {
            // Each diff has different pages.
            let dirty = Dirty::new(ram.size, PAGE, one_in + number, pattern);
            let options = MemoryWriter::options()
                .layout(Layout::Packed)
                .seal(Seal::new().parent(parent));
            parent = write(&path(number), options, ram, Some(&dirty));
            paths.push(path(number));
        }
        paths
    }

    fn verify(&mut self, ram: &Ram) {
        let path = self.place.join("sealed.mem");
        write(&path, sealed(), ram, None);
        let verify = |path: &Path| {
            let image = Image::open(path).unwrap();
            let found = image.verify(&mut |_| ControlFlow::Continue(())).unwrap();
            assert!(found.is_ok());
        };
        let timed = |run: &dyn Fn(&Path)| {
            evict(&path);
            let start = Instant::now();
            run(&path);
            start.elapsed()
        };
        let case = Case {
            name: "verify a sealed image of 1 GiB, not in the page cache".into(),
            group: "read",
            bytes: ram.size,
            before: Before::Nothing,
            contenders: vec![
                timed_contender(OURS, |_| timed(&verify)),
                timed_contender(READER, |_| timed(&bare::read)),
            ],
        };
        self.run(&case, &[(READER, 0.8)]);
        let name = "verify a sealed image in the page cache";
        if self.wants(name) {
            verify(&path);
            let start = Instant::now();
            verify(&path);
            let speed = ram.size as f64 / start.elapsed().as_secs_f64() / 1e9;
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            self.figure(
                name,
                format!("{speed:.1} GB/s by {cores} cores"),
                "3 GB/s a core, or the device's",
            );
        }
        std::fs::remove_file(&path).unwrap();
    }

    /// Compares merging ten diffs onto their base.
    fn merge(&mut self, ram: &Ram) {
        let paths = self.chain(ram, 100, Pattern::Random);
        let merged = |options: MemoryWriterOptions, dest: &Path, paths: &[PathBuf]| {
            let chain = Chain::open_sealed(paths).unwrap();
            chain.merge(options, dest).unwrap();
        };
        let case = Case {
            name: "merge 10 diffs of 1 % onto 1 GiB, to a raw image".into(),
            group: "read",
            bytes: ram.size,
            before: Before::Nothing,
            contenders: vec![
                contender(OURS, |dest| merged(MemoryWriter::options(), dest, &paths)),
                contender(LIMIT, |dest| {
                    raw::fresh(dest, ram.size, &[0..ram.size], &ram.reader())
                }),
            ],
        };
        self.run(&case, &[(LIMIT, 0.85)]);
        drop(case);
        let name = "memory of merging 10 diffs onto 1 GiB";
        if self.wants(name) {
            let before = resident();
            let peak = Arc::new(AtomicU64::new(0));
            let seen = Arc::clone(&peak);
            let options = MemoryWriter::options().progress(move |_| {
                seen.fetch_max(resident(), Ordering::Relaxed);
                std::ops::ControlFlow::Continue(())
            });
            let dest = self.place.join("merged.mem");
            merged(options, &dest, &paths);
            std::fs::remove_file(dest).unwrap();
            let more = peak.load(Ordering::Relaxed).saturating_sub(before);
            let more = more as f64 / f64::from(1 << 20);
            self.figure(name, format!("{more:.1} MiB"), "at most 64 MiB");
        }
        for path in paths {
            std::fs::remove_file(path).unwrap();
        }
    }
}

fn packed_diff<'a>(ram: &'a Ram, dirty: &'a Dirty, name: &str, before: Before) -> Case<'a> {
    let mut case = diff(ram, dirty, name);
    case.before = before;
    let size = ram.size;
    case.contenders.retain(|contender| contender.name == SQUIB);
    let ours = contender(OURS, move |dest| {
        let seal = Seal::new().parent(ImageId::from_bytes([1; 16]));
        let options = MemoryWriter::options().layout(Layout::Packed).seal(seal);
        let options = match before {
            Before::Nothing => options,
            Before::Previous => options.recycle(u64::MAX),
        };
        let mut writer = options.open(dest, size, PAGE).unwrap();
        writer.write_diff(&ram.reader(), &dirty.ours).unwrap();
        writer.commit().unwrap();
    });
    case.contenders.insert(0, ours);
    case.contenders.push(contender(LIMIT, move |dest| {
        if before == Before::Previous && dest.exists() {
            bare::packed_over(dest, &dirty.runs, &ram.reader());
        } else {
            bare::packed(dest, &dirty.runs, &ram.reader());
        }
    }));
    case
}

fn write(
    path: &Path,
    options: MemoryWriterOptions,
    ram: &Ram,
    dirty: Option<&Dirty>,
) -> memory_writer::ImageId {
    let mut writer = options.open(path, ram.size, PAGE).unwrap();
    let id = writer.image_id().unwrap();
    match dirty {
        None => writer.write_full(&ram.reader()).unwrap(),
        Some(dirty) => _ = writer.write_diff(&ram.reader(), &dirty.ours).unwrap(),
    }
    writer.commit().unwrap();
    id
}

fn timed_contender<'a>(name: &'static str, run: impl Fn(&Path) -> Duration + 'a) -> Contender<'a> {
    Contender {
        name,
        run: Box::new(run),
    }
}

/// Removes a file from the page cache.
fn evict(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
}
