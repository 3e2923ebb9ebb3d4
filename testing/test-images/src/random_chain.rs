//! Random chains of all kinds of images.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use image_format::{Checksums, Footer, ImageId, ImageKind, Placement, Run, Version};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use proptest::prelude::*;

/// The way in which a layer's pages are written to its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// By `MemoryWriter`.
    Written(Layout),
    /// A hand-made footer that records zeros, which no writer of diffs does. In a packed file the
    /// pages are in reverse order.
    ByHand(Layout),
}

/// The guest's writes before a pass: fills these pages with the value, which may be 0.
type Writes = Vec<(u64, u64, u8)>;

/// An image of a random chain.
#[derive(Clone, Debug)]
pub struct Layer {
    /// How its file is written.
    pub form: Form,
    /// Binary logarithm of the layer's page size divided by the chain's.
    coarser: u32,
    /// One write each, through one writer. Writes of a base before `full` are superseded by it.
    passes: Vec<Writes>,
    full: prop::sample::Index,
}

/// Returns a strategy for the full image of a chain, or for a diff.
pub fn layer(base: bool) -> impl Strategy<Value = Layer> {
    let mut forms: Vec<_> = Layout::ALL.map(Form::Written).into();
    // Twice as often: its pages are the most scattered.
    forms.push(Form::Written(Layout::Packed));
    if !base {
        let with_footer = Layout::ALL.into_iter().filter(|layout| layout.has_footer());
        forms.extend(with_footer.map(Form::ByHand));
    }
    // Mostly single pages, so that adjacent pages of the RAM are scattered in a packed file.
    let write = (
        0..64_u64,
        prop::sample::select(vec![1, 1, 1, 1, 2, 12_u64]),
        prop::sample::select(vec![0, 1, 2, 3_u8]),
    );
    (
        prop::sample::select(forms),
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
#[derive(Debug)]
pub struct RandomGuest {
    dir: tempfile::TempDir,
    page: u64,
    /// The bytes of the RAM.
    pub ram: Vec<u8>,
    dirty: DirtyBitmap,
    /// The images, oldest first, with the pages that each holds at least.
    pub images: Vec<(PathBuf, Vec<Range<u64>>)>,
    newest: Option<ImageId>,
    /// A counter that makes every written page unique.
    written: u64,
}

impl RandomGuest {
    /// Creates a guest with `size` bytes of zeros.
    #[must_use]
    pub fn new(size: u64, page: u64) -> Self {
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

    /// Returns the page size of the chain in bytes.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Returns the path of a file beside the images.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
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
                self.dirty.mark(page * self.page).unwrap();
            }
        }
    }

    /// Writes the layer's pages, and saves the image.
    pub fn take(&mut self, layer: &Layer) {
        let path = self.path(&format!("{}.mem", self.images.len()));
        let page = self.page << layer.coarser;
        let runs = match layer.form {
            Form::Written(layout) => self.take_in_passes(layer, &path, page, (layout, self.seal())),
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
        let start = layout.data_start(page);
        let end = start + present * page;
        let mut described = Vec::new();
        for at in runs.iter().flat_map(pages) {
            if is_zero(at) {
                described.push(Run::zeros(at..at + page));
                continue;
            }
            present -= 1;
            let offset = match layout.placement() {
                Placement::ByOffset => start + at,
                Placement::Appended => start + present * page,
            };
            file.write_all_at(bytes(at), offset).unwrap();
            checksums.update(at, bytes(at));
            described.push(Run::present(at..at + page, offset));
        }
        if layout.placement() == Placement::Appended {
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
}

fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .durability(Durability::None)
}
