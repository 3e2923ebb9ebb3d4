//! Reads random chains of all kinds of images in every way, and compares the result with the RAM.

use std::fs::{self, File};
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use image_format::{Checksums, Footer, ImageKind, Run, Version, packed_start};
use memory_image::{
    Chain, ChainError, HostRam, Image, ImageId, MapError, MappedChain, MappedImage, RamTarget,
    compare,
};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;
use proptest::prelude::*;

/// The way in which a layer's pages are written to its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Raw,
    Sealed,
    Packed,
    /// A hand-made footer that records zeros, which no writer of diffs does. In a packed file the
    /// pages are in reverse order.
    ByHand(Layout),
}

/// The guest's writes before a pass: fills these pages with the value, which may be 0.
type Writes = Vec<(u64, u64, u8)>;

#[derive(Clone, Debug)]
struct Layer {
    form: Form,
    /// Binary logarithm of the layer's page size divided by the chain's.
    coarser: u32,
    /// One write each, through one writer. Writes of a base before `full` are superseded by it.
    passes: Vec<Writes>,
    full: prop::sample::Index,
}

fn layer(base: bool) -> impl Strategy<Value = Layer> {
    let forms = [
        Form::Packed,
        Form::Packed,
        Form::Sealed,
        Form::Raw,
        Form::ByHand(Layout::Packed),
        Form::ByHand(Layout::Sealed),
    ];
    let forms = &forms[..if base { 4 } else { 6 }];
    // Mostly single pages, so that adjacent pages of the RAM are scattered in a packed file.
    let write = (
        0..64_u64,
        prop::sample::select(vec![1, 1, 1, 1, 2, 12_u64]),
        prop::sample::select(vec![0, 1, 2, 3_u8]),
    );
    (
        prop::sample::select(forms.to_vec()),
        0..3_u32,
        prop::collection::vec(prop::collection::vec(write, 0..3), 1..20),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(form, coarser, passes, full)| Layer {
            form,
            coarser,
            passes,
            full,
        })
}

/// A guest and its images.
struct Guest {
    dir: tempfile::TempDir,
    page: u64,
    ram: Vec<u8>,
    dirty: DirtyBitmap,
    /// The images, with the pages that each holds at least.
    images: Vec<(PathBuf, Vec<Range<u64>>)>,
    newest: Option<ImageId>,
    /// A counter that makes every written page unique.
    written: u64,
}

impl Guest {
    fn new(size: u64, page: u64) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            page,
            ram: vec![0; size as usize],
            dirty: DirtyBitmap::new(0, size, page).unwrap(),
            images: Vec::new(),
            newest: None,
            written: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&mut self, writes: &Writes) {
        let pages = self.ram.len() as u64 / self.page;
        for (start, len, value) in writes {
            let (start, len) = (start % pages, *len);
            for page in start..pages.min(start + len) {
                self.written += 1;
                let unique = match value {
                    0 => 0,
                    _ => self.written.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
                };
                let at = (page * self.page) as usize;
                let bytes = &mut self.ram[at..at + self.page as usize];
                let words = bytes.chunks_mut(8);
                words.for_each(|word| word.copy_from_slice(&unique.to_le_bytes()));
                self.dirty.set_dirty(page * self.page).unwrap();
            }
        }
    }

    fn take(&mut self, layer: &Layer) {
        let path = self.path(&format!("{}.mem", self.images.len()));
        let page = self.page << layer.coarser;
        let runs = match layer.form {
            Form::Raw => self.take_in_passes(layer, &path, page, (Layout::Raw, self.seal())),
            Form::Sealed => self.take_in_passes(layer, &path, page, (Layout::Sealed, self.seal())),
            Form::Packed => self.take_in_passes(layer, &path, page, (Layout::Packed, self.seal())),
            Form::ByHand(layout) => {
                layer.passes.iter().for_each(|writes| self.write(writes));
                self.take_by_hand(&path, layout)
            }
        };
        self.images.push((path, runs));
    }

    fn seal(&self) -> Seal {
        match self.newest {
            Some(id) => Seal::new().parent(id),
            None => Seal::new().on_raw_image(),
        }
    }

    fn take_in_passes(
        &mut self,
        layer: &Layer,
        path: &Path,
        page: u64,
        (layout, seal): (Layout, Seal),
    ) -> Vec<Range<u64>> {
        let full = self
            .images
            .is_empty()
            .then(|| layer.full.index(layer.passes.len()));
        let mut writer = options(layout, seal)
            .skip_zeros(true)
            .allow_ambiguous_diff(true)
            .open(path, self.ram.len() as u64, page)
            .unwrap();
        let mut runs = Vec::new();
        for (number, writes) in layer.passes.iter().enumerate() {
            self.write(writes);
            let dirty = self.dirty.drain().unwrap();
            if full == Some(number) {
                writer.write_full(&self.ram).unwrap();
            } else {
                writer.write_diff(&self.ram, &dirty).unwrap();
            }
            runs.extend(dirty.runs());
        }
        self.newest = writer.image_id();
        writer.commit().unwrap();
        runs
    }

    fn take_by_hand(&mut self, path: &Path, layout: Layout) -> Vec<Range<u64>> {
        let (size, page) = (self.ram.len() as u64, self.page);
        let file = File::create(path).unwrap();
        file.set_len(size).unwrap();
        let runs: Vec<_> = self.dirty.drain().unwrap().runs().collect();
        let pages = |run: &Range<u64>| run.clone().step_by(page as usize);
        let bytes = |at: u64| &self.ram[at as usize..(at + page) as usize];
        let is_zero = |at: u64| bytes(at).iter().all(|byte| *byte == 0);
        let mut checksums = Checksums::new(size);
        let mut present = runs
            .iter()
            .flat_map(pages)
            .filter(|at| !is_zero(*at))
            .count() as u64;
        let start = packed_start(page);
        let end = start + present * page;
        let mut described = Vec::new();
        for at in runs.iter().flat_map(pages) {
            if is_zero(at) {
                described.push(Run::zeros(at..at + page));
                continue;
            }
            present -= 1;
            let offset = match layout {
                Layout::Raw | Layout::Sealed => at,
                Layout::Packed => start + present * page,
            };
            file.write_all_at(bytes(at), offset).unwrap();
            checksums.update(at, bytes(at));
            described.push(Run::present(at..at + page, offset));
        }
        if layout == Layout::Packed {
            file.set_len(end).unwrap();
        }
        let footer = Footer {
            version: Version::CURRENT,
            id: ImageId::random().unwrap(),
            kind: ImageKind::Diff {
                parent: self.newest,
            },
            layout,
            ram_size: size,
            page_size: page,
            regions: vec![0..size],
            runs: described,
            checksums: checksums.finish(),
            metadata: Vec::new(),
        };
        footer.write(&file).unwrap();
        self.newest = Some(footer.id);
        runs
    }

    fn chain(&self) -> Chain {
        let open = |path: &Path| Image::open(path).or_else(|_| Image::open_raw(path));
        let full = open(&self.images[0].0).unwrap();
        let mut chain = Chain::from_image(full, self.page).unwrap();
        for (path, runs) in &self.images[1..] {
            match chain.push_image(open(path).unwrap()) {
                // Every page was dirty.
                Err(ChainError::AmbiguousDiff { .. }) => {
                    chain.push_pages(path, runs.iter().cloned()).unwrap();
                }
                pushed => pushed.unwrap(),
            }
        }
        chain
    }
}

fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .durability(Durability::None)
}

fn whole(reader: &impl PageReader, size: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; size];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Returns the pages that differ, for the message of a failing test.
fn wrong(found: &[u8], expected: &[u8], page: u64) -> Vec<usize> {
    let pages = found
        .chunks(page as usize)
        .zip(expected.chunks(page as usize));
    let differ = pages.enumerate().filter(|(_, (a, b))| a != b);
    differ.map(|(number, _)| number).collect()
}

struct InFile(File, u64);

impl RamTarget for InFile {
    fn ram_size(&self) -> u64 {
        self.1
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
}

fn restored_to_memory(chain: &Chain, split: usize) -> [Vec<u8>; 3] {
    let size = chain.ram_size() as usize;
    let (mut all, mut stored, mut regions) = (vec![0xee; size], vec![0; size], vec![0xee; size]);
    chain.restore(all.as_mut_slice()).unwrap();
    chain.restore_zeroed(stored.as_mut_slice()).unwrap();
    let (low, high) = regions.split_at_mut(split);
    // SAFETY: both halves live until the target is dropped, and nothing else accesses them.
    #[allow(unsafe_code)]
    let mut target = unsafe {
        HostRam::new([
            (low.as_mut_ptr(), low.len()),
            (high.as_mut_ptr(), high.len()),
        ])
    };
    chain.restore(&mut target).unwrap();
    [all, stored, regions]
}

fn restored_to_file(guest: &Guest, chain: &Chain) -> Vec<u8> {
    let path = guest.path("restored");
    let file = File::create(&path).unwrap();
    file.set_len(chain.ram_size()).unwrap();
    chain
        .restore_zeroed(&mut InFile(file, chain.ram_size()))
        .unwrap();
    fs::read(path).unwrap()
}

fn merged(guest: &Guest, chain: &Chain, layout: Layout) -> Vec<u8> {
    let path = guest.path("merged");
    let _ = fs::remove_file(&path);
    chain.merge(options(layout, chain.seal()), &path).unwrap();
    let image = match layout {
        Layout::Raw => Image::open_raw(&path),
        _ => Image::open(&path),
    };
    let image = image.unwrap();
    if image.footer().is_some() {
        let found = image.verify(&|_, _| ControlFlow::Continue(())).unwrap();
        assert!(found.is_ok(), "{found:?}");
    }
    let merged = Chain::from_image(image, chain.page_size()).unwrap();
    whole(&merged, chain.ram_size() as usize)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(128, 1000)))]

    #[test]
    fn every_way_to_read_any_chain_yields_the_guest_ram(
        page in prop::sample::select(vec![512, 1024, 4096, 16384_u64]),
        pages in 1..24_u64,
        base in layer(true),
        diffs in prop::collection::vec(layer(false), 0..5),
        reads in prop::collection::vec(any::<[prop::sample::Index; 2]>(), 8),
        most in prop::sample::select(vec![2, 3, 5, 9_usize]),
    ) {
        // Whole pages of every layer, but not always of the host.
        let size = pages * (page << 2);
        let mut guest = Guest::new(size, page);
        guest.take(&base);
        let first = guest.ram.clone();
        diffs.iter().for_each(|layer| guest.take(layer));
        let (chain, ram) = (guest.chain(), &guest.ram);
        let assert_ram = |how: &str, found: &[u8]| {
            let wrong = wrong(found, ram, page);
            prop_assert!(wrong.is_empty() && found.len() == ram.len(), "{how}: pages {wrong:?}");
            Ok(())
        };

        assert_ram("read", &whole(&chain, ram.len()))?;
        for [one, other] in reads {
            let (one, other) = (one.index(ram.len()), other.index(ram.len()));
            let range = one.min(other)..one.max(other);
            let mut bytes = vec![0xee; range.len()];
            chain.read_at(range.start as u64, &mut bytes).unwrap();
            prop_assert!(bytes == ram[range]);
        }
        let mut populated = vec![0; ram.len()];
        for run in chain.populated(0..size) {
            let run = run.start as usize..run.end as usize;
            populated[run.clone()].copy_from_slice(&ram[run]);
        }
        assert_ram("populated", &populated)?;

        for found in restored_to_memory(&chain, ram.len() / 3) {
            assert_ram("restored to memory", &found)?;
        }
        assert_ram("restored to a file", &restored_to_file(&guest, &chain))?;
        for most in [1, most, 16_384] {
            let mapped = MappedChain::options().max_mappings(most).map(&chain).unwrap();
            assert_ram(&format!("{most} mappings"), &whole(&mapped, ram.len()))?;
        }
        let path = &guest.images[0].0;
        let mapped = match base.form {
            Form::Raw => MappedImage::open_raw(path),
            _ => MappedImage::open(path),
        };
        match mapped {
            Err(MapError::Packed { .. }) => prop_assert_eq!(base.form, Form::Packed),
            mapped => prop_assert!(whole(&mapped.unwrap(), ram.len()) == first),
        }
        for layout in Layout::ALL {
            let how = format!("merged: {layout:?}");
            assert_ram(&how, &merged(&guest, &chain, layout))?;
        }

        let changed = compare(&first, &chain, size, page, &|_| ControlFlow::Continue(())).unwrap();
        let differ = wrong(&first, ram, page);
        let marked = (0..size / page).filter(|number| changed.is_dirty(number * page).unwrap());
        prop_assert!(marked.eq(differ.into_iter().map(|number| number as u64)));
    }
}
