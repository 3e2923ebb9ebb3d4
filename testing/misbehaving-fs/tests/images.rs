//! Images on a file system that reports written bytes as a hole are read as they were written.
#![cfg(target_os = "linux")]

mod support;

use std::cell::Cell;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, Image, ImageError, MappedChain, Unclear, compare};
use memory_writer::{AmbiguousDiff, Layout, MemoryWriter, Seal, SnapshotError};
use misbehaving_fs::{Behaviour, Lseek, MisbehavingFs, Reads};
use page_reader::{HostMemory, PageReader};
use rstest::rstest;
use sparse_file::{HolesUnknown, PagesUnknown};
use support::{PAGE, RAM, answering, mount, reading};

const ALL: ControlFlow<()> = ControlFlow::Continue(());

/// No page of it is zeros, but for the last eighth.
fn ram(stamp: u8) -> Vec<u8> {
    let mut ram: Vec<u8> = (0..RAM).map(|at| (at / PAGE % 251) as u8 + stamp).collect();
    ram[(RAM / 8 * 7) as usize..].fill(0);
    ram
}

fn full(path: &Path, layout: Layout, ram: &[u8]) {
    let mut writer = MemoryWriter::options()
        .layout(layout)
        .skip_zeros(true)
        .open(path, RAM, PAGE)
        .unwrap();
    writer.write_full(ram).unwrap();
    writer.commit().unwrap();
}

fn dirty(pages: &[u64]) -> DirtyBitmap {
    let dirty = DirtyBitmap::new(0, RAM, PAGE).unwrap();
    for page in pages {
        dirty.set_dirty(page * PAGE).unwrap();
    }
    dirty
}

/// How many are marked.
fn pages(marks: &DirtyBitmap) -> u64 {
    marks.runs().map(|run| (run.end - run.start) / PAGE).sum()
}

fn restored(chain: &Chain) -> Vec<u8> {
    let mut zeroed = vec![0; RAM as usize];
    chain.restore_zeroed(zeroed.as_mut_slice()).unwrap();
    let mut all = vec![1; RAM as usize];
    chain.restore(all.as_mut_slice()).unwrap();
    assert!(zeroed == all);
    zeroed
}

#[allow(unsafe_code)]
fn mapped(chain: &Chain) -> Vec<u8> {
    let mapped = MappedChain::open(chain).unwrap();
    let mut bytes = vec![0; RAM as usize];
    // SAFETY: mapped for as long as `mapped` lives, which is longer than the reading takes.
    let memory = unsafe { HostMemory::new(mapped.as_ptr(), mapped.len()) };
    memory.copy_to(&mut bytes);
    bytes
}

const LIES: [Lseek; 4] = [
    Lseek::Exact,
    Lseek::AllHole,
    Lseek::HoleIsEnxio,
    Lseek::DataIsEnxio,
];

fn opened(path: &Path, layout: &Layout) -> Chain {
    match layout {
        Layout::Raw => Chain::open_raw(path, PAGE).unwrap(),
        _ => Chain::open(path, PAGE).unwrap(),
    }
}

#[rstest]
#[case::raw(Layout::Raw)]
#[case::sealed(Layout::Sealed(Seal::new()))]
#[case::packed(Layout::Packed(Seal::new()))]
fn full_images_are_read_whatever_holes_are_reported(#[case] layout: Layout) {
    let Some(fs) = mount(
        "full_images_are_read_whatever_holes_are_reported",
        Behaviour::default(),
    ) else {
        return;
    };
    let (image, other) = (fs.path().join("full.mem"), fs.path().join("other.mem"));
    full(&image, layout.clone(), &ram(1));
    full(&other, layout.clone(), &ram(2));
    for lie in LIES {
        fs.set(answering(lie));
        let chain = opened(&image, &layout);
        assert!(restored(&chain) == ram(1), "{lie:?}");
        assert!(mapped(&chain) == ram(1), "{lie:?}");
        let flat = fs.path().join("flat.mem");
        chain.flatten(&flat).unwrap();
        assert!(std::fs::read(&flat).unwrap() == ram(1), "{lie:?}");
        // All pages but the zeros of both differ.
        let later = opened(&other, &layout);
        let changed = compare(&chain, &later, RAM, PAGE, &|_| ALL).unwrap();
        assert_eq!(pages(&changed), RAM / 8 * 7 / PAGE, "{lie:?}");
    }
}

/// What stands between the pages of a sealed image is data, so that it is looked at.
#[test]
fn verify_finds_bytes_between_pages_whatever_holes_are_reported() {
    const TEST: &str = "verify_finds_bytes_between_pages_whatever_holes_are_reported";
    let Some(fs) = mount(TEST, Behaviour::default()) else {
        return;
    };
    let image = fs.path().join("full.mem");
    full(&image, Layout::Sealed(Seal::new()), &ram(1));
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9], RAM - PAGE).unwrap();
    for lie in LIES {
        fs.set(answering(lie));
        let found = Image::open(&image).unwrap().verify(&|_, _| ALL);
        let damages = found.unwrap().damages;
        assert_eq!(damages.len(), 1, "{lie:?}");
        assert_eq!(damages[0].offset(), RAM - PAGE, "{lie:?}");
    }
}

/// Counts how often it is read.
struct Counted(Vec<u8>, Cell<u32>);

impl PageReader for Counted {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.1.set(self.1.get() + 1);
        self.0.read_at(offset, buf)
    }
}

fn names(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| !name.starts_with(".fuse_hidden"))
        .collect()
}

#[test]
fn a_raw_diff_on_fuse_is_refused_before_ram_is_read() {
    let Some(fs) = mount(
        "a_raw_diff_on_fuse_is_refused_before_ram_is_read",
        Behaviour::default(),
    ) else {
        return;
    };
    let marks = dirty(&[3, 9]);
    let epoch = marks.begin_epoch().unwrap();
    let reader = Counted(ram(1), Cell::new(0));
    let dest = fs.path().join("diff.mem");
    let mut writer = MemoryWriter::open(&dest, RAM, PAGE).unwrap();
    let error = writer.write_diff(&reader, epoch.bitmap()).unwrap_err();
    assert!(
        matches!(
            &error,
            SnapshotError::AmbiguousDiff {
                source: AmbiguousDiff::Holes(PagesUnknown::Holes(HolesUnknown::FileSystem { file_system })),
                ..
            } if file_system == "fuse"
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("Layout::Packed"), "{error}");
    assert_eq!(reader.1.get(), 0);
    // Nothing was written, so that all of the RAM still can be.
    writer.write_full(&reader).unwrap();
    drop(writer);
    drop(epoch);
    assert_eq!(pages(&marks), 2);
    assert_eq!(names(fs.below()), [""; 0]);
}

#[test]
fn a_raw_diff_on_fuse_is_not_read_by_its_holes() {
    let Some(fs) = mount(
        "a_raw_diff_on_fuse_is_not_read_by_its_holes",
        Behaviour::default(),
    ) else {
        return;
    };
    let (base, diff) = (fs.path().join("full.mem"), fs.path().join("diff.mem"));
    full(&base, Layout::Raw, &ram(1));
    let mut writer = MemoryWriter::options()
        .allow_ambiguous_diff(true)
        .open(&diff, RAM, PAGE)
        .unwrap();
    writer.write_diff(&ram(2), &dirty(&[3, 9])).unwrap();
    writer.commit().unwrap();
    for lie in LIES {
        fs.set(answering(lie));
        let mut chain = Chain::open_raw(&base, PAGE).unwrap();
        let error = chain.push_raw(&diff).unwrap_err();
        assert!(
            matches!(
                error,
                ImageError::UnclearDiff {
                    why: Unclear::Holes(PagesUnknown::Holes(HolesUnknown::FileSystem { .. })),
                    ..
                }
            ),
            "{error:?}"
        );
        // Its pages, given by the caller.
        chain
            .push_pages(&diff, [3, 9].map(|page| page * PAGE..(page + 1) * PAGE))
            .unwrap();
        let mut expected = ram(1);
        for page in [3, 9] {
            let page = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            expected[page.clone()].copy_from_slice(&ram(2)[page]);
        }
        assert!(restored(&chain) == expected, "{lie:?}");
    }
}

#[rstest]
#[case::sealed(|seal| Layout::Sealed(seal))]
#[case::packed(|seal| Layout::Packed(seal))]
fn sealed_and_packed_diffs_need_no_holes(#[case] layout: fn(Seal) -> Layout) {
    let Some(fs) = mount(
        "sealed_and_packed_diffs_need_no_holes",
        answering(Lseek::AllHole),
    ) else {
        return;
    };
    let (base, diff) = (fs.path().join("full.mem"), fs.path().join("diff.mem"));
    full(&base, layout(Seal::new()), &ram(1));
    let parent = Image::open(&base).unwrap().id().unwrap();
    let mut writer = MemoryWriter::options()
        .layout(layout(Seal::new().parent(parent)))
        .open(&diff, RAM, PAGE)
        .unwrap();
    writer.write_diff(&ram(2), &dirty(&[3, 9])).unwrap();
    writer.commit().unwrap();
    let chain = Chain::open_sealed(&[&base, &diff]).unwrap();
    let mut expected = ram(1);
    for page in [3, 9] {
        let page = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
        expected[page.clone()].copy_from_slice(&ram(2)[page]);
    }
    assert!(restored(&chain) == expected);
}

/// Every layout on a file system that answers reads as `reads`.
fn images(fs: &MisbehavingFs, reads: Reads, check: impl Fn(Chain, &str)) {
    let layouts = [
        ("raw", Layout::Raw),
        ("sealed", Layout::Sealed(Seal::new())),
        ("packed", Layout::Packed(Seal::new())),
    ];
    for (name, layout) in layouts {
        fs.set(Behaviour::default());
        let path = fs.path().join(name);
        full(&path, layout.clone(), &ram(1));
        fs.set(reading(reads));
        check(opened(&path, &layout), name);
    }
}

#[test]
fn short_reads_are_read_on() {
    let Some(fs) = mount("short_reads_are_read_on", Behaviour::default()) else {
        return;
    };
    images(&fs, Reads::Short, |chain, name| {
        assert!(restored(&chain) == ram(1), "{name}");
    });
}

#[test]
fn a_read_error_inside_an_image_is_reported_with_its_offset() {
    let Some(fs) = mount(
        "a_read_error_inside_an_image_is_reported_with_its_offset",
        Behaviour::default(),
    ) else {
        return;
    };
    let bad = 2 << 20;
    images(&fs, Reads::FailAt(bad), |chain, name| {
        let mut ram = vec![0; RAM as usize];
        let error = chain.restore_zeroed(ram.as_mut_slice()).unwrap_err();
        let ImageError::Read { offset, source, .. } = &error else {
            panic!("{name}: {error:?}");
        };
        assert_eq!(source.raw_os_error(), Some(libc::EIO), "{name}");
        assert!((bad - (1 << 20)..=bad).contains(offset), "{name}: {offset}");
    });
}
