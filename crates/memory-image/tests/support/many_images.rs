//! A guest with many images, and a process that may have few descriptors.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, Image, ImageId};
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use nix::sys::resource::{Resource, setrlimit};
use page_reader::PageReader;

use test_images::write_packed;

pub const PAGE: u64 = 4096;
pub const PAGES: u64 = 256;
/// Descriptor limit of a process that cannot keep all images open: a quarter of them is for images.
pub const FEW: u64 = 64;
pub const OPEN: usize = 16;

pub fn have_few_descriptors() {
    setrlimit(Resource::RLIMIT_NOFILE, FEW, FEW).unwrap();
}

/// Returns the number of descriptors, including those that the process has inherited.
pub fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[derive(Clone, Copy)]
pub enum Form {
    Raw,
    Sealed,
    Packed,
}

/// A full image and diffs, each of which changes one more page.
pub struct Guest {
    pub dir: tempfile::TempDir,
    pub ram: Vec<u8>,
    pub paths: Vec<PathBuf>,
    newest: Option<ImageId>,
}

/// Opens an image of any form. The raw images of these tests never look like sealed ones.
pub fn open(path: &Path) -> Image {
    Image::open(path)
        .or_else(|_| Image::open_raw(path))
        .unwrap()
}

impl Guest {
    pub fn new(layers: usize, form: impl Fn(usize) -> Form) -> Self {
        let mut guest = Self {
            dir: tempfile::tempdir().unwrap(),
            ram: vec![0; (PAGES * PAGE) as usize],
            paths: Vec::new(),
            newest: None,
        };
        for layer in 0..layers {
            guest.save(form(layer));
        }
        guest
    }

    /// Returns the page that only this layer holds, or that it holds first.
    fn page_of(layer: usize) -> u64 {
        layer as u64 * 7 % PAGES
    }

    /// Changes the page of the next layer, or all pages in the first layer. Returns the path of the
    /// layer and the page.
    fn change(&mut self) -> (PathBuf, u64) {
        let layer = self.paths.len();
        let path = self.dir.path().join(format!("{layer}.mem"));
        let page = Self::page_of(layer);
        let start = (page * PAGE) as usize;
        let changed = match layer {
            0 => &mut self.ram[..],
            _ => &mut self.ram[start..start + PAGE as usize],
        };
        let words = changed.chunks_mut(8);
        words.for_each(|word| word.copy_from_slice(&(layer as u64 + 1).to_le_bytes()));
        self.paths.push(path.clone());
        (path, page)
    }

    pub fn save(&mut self, form: Form) {
        let (path, page) = self.change();
        let seal = match self.newest {
            Some(id) => Seal::new().parent(id),
            None => Seal::new().on_raw_image(),
        };
        let layout = match form {
            Form::Raw => Layout::Raw,
            Form::Sealed => Layout::Sealed,
            Form::Packed => Layout::Packed,
        };
        let size = self.ram.len() as u64;
        let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
        dirty.mark(page * PAGE).unwrap();
        let mut writer = MemoryWriter::options()
            .layout(layout)
            .seal(seal)
            .durability(Durability::None)
            .open(&path, size, PAGE)
            .unwrap();
        match self.paths.len() {
            1 => writer.write_full(&self.ram).unwrap(),
            _ => _ = writer.write_diff(&self.ram, &dirty).unwrap(),
        }
        self.newest = writer.image_id();
        writer.commit().unwrap();
    }

    pub fn save_by_hand(&mut self) {
        let (path, page) = self.change();
        let pages = match self.newest {
            None => 0..PAGES,
            Some(_) => page..page + 1,
        };
        let bytes = |page| self.ram[(page * PAGE) as usize..][..PAGE as usize].to_vec();
        let pages: Vec<_> = pages.map(|page| (page, bytes(page))).collect();
        let size = self.ram.len() as u64;
        self.newest = Some(write_packed(&path, size, PAGE, self.newest, &pages));
    }

    pub fn chain(&self) -> Chain {
        let mut chain = Chain::from_image(open(&self.paths[0]), PAGE).unwrap();
        for path in &self.paths[1..] {
            chain.push_image(open(path)).unwrap();
        }
        chain
    }

    pub fn read(&self, chain: &Chain, layer: usize) -> io::Result<()> {
        let offset = Self::page_of(layer) * PAGE;
        let mut bytes = vec![0xee; PAGE as usize];
        chain.read_at(offset, &mut bytes)?;
        assert!(bytes == self.ram[offset as usize..][..PAGE as usize]);
        Ok(())
    }
}
