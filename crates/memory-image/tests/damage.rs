//! Every flipped bit and every truncation of a sealed or packed image is detected.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use memory_image::Image;
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use test_machine::rounds;

/// Writes a full image with few small pages, and a diff with written pages, zeros and gaps.
fn small(layout: Layout) -> (tempfile::TempDir, [PathBuf; 2]) {
    const PAGE: u64 = 512;
    const RAM: u64 = 5 * PAGE;
    let dir = tempfile::tempdir().unwrap();
    let paths = ["full", "diff"].map(|name| dir.path().join(name));
    let dirty = DirtyBitmap::new(0, RAM, PAGE).unwrap();
    let mut ram = vec![0; RAM as usize];
    let mut parent = None;
    for (path, pages) in paths.iter().zip([1..3_u64, 2..4]) {
        let start = pages.start * PAGE;
        ram[start as usize..][..PAGE as usize].fill(pages.start as u8);
        dirty.mark_range(start, pages.end * PAGE - start).unwrap();
        let taken = dirty.drain().unwrap();
        let seal = match parent {
            Some(parent) => Seal::new().parent(parent),
            None => Seal::new(),
        };
        let options = MemoryWriter::options()
            .layout(layout)
            .seal(seal)
            .skip_zeros(true);
        let options = options.durability(Durability::None);
        let mut writer = options.open(path, RAM, PAGE).unwrap();
        match parent {
            Some(_) => writer.write_diff(&ram, &taken).map(drop).unwrap(),
            None => writer.write_full(&ram).unwrap(),
        }
        parent = writer.image_id();
        writer.commit().unwrap();
    }
    (dir, paths)
}

/// Returns whether the image at `path` is refused or found damaged.
fn is_detected(path: &Path) -> bool {
    let Ok(image) = Image::open(path) else {
        return true;
    };
    let found = image.verify(&mut |_| ControlFlow::Continue(()));
    found.map_or(true, |found| !found.is_ok())
}

fn flip(file: &File, at: u64, bits: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ bits], at).unwrap();
}

/// Calls `check` with the images of each layout that has checksums.
fn of_each_layout(check: impl Fn(&[PathBuf; 2])) {
    for layout in Layout::ALL.into_iter().filter(|layout| layout.has_footer()) {
        println!("{layout}");
        let (_dir, paths) = small(layout);
        check(&paths);
    }
}

#[test]
fn every_flipped_bit_is_detected() {
    of_each_layout(flip_every_bit);
}

fn flip_every_bit(paths: &[PathBuf; 2]) {
    for path in paths {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        // Two or three bits of each byte, or all of them.
        for bit in (0..8 * len).step_by(rounds(3, 1)) {
            let (at, bits) = (bit / 8, 1 << (bit % 8));
            flip(&file, at, bits);
            assert!(is_detected(path), "bit {bit} of {len} bytes in {path:?}");
            flip(&file, at, bits);
        }
        assert!(!is_detected(path));
    }
}

#[test]
fn every_truncation_is_detected() {
    of_each_layout(cut_everywhere);
}

fn cut_everywhere(paths: &[PathBuf; 2]) {
    for path in paths {
        let file = File::options().write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        for len in (0..len).rev() {
            file.set_len(len).unwrap();
            assert!(is_detected(path), "{path:?} cut to {len}");
        }
    }
}
