//! Images on a file system that reports written bytes as a hole are read correctly.
#![cfg(target_os = "linux")]

mod support;

use std::cell::Cell;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, ChainError, Image, MappedChain, ReadImageError, RestoreError, compare};
use memory_writer::{Layout, MemoryWriter, Seal, SnapshotError, WriteAmbiguity};
use misbehaving_fs::{Behavior, Lseek, MisbehavingFs, Reads};
use page_reader::{HostMemory, PageReader};
use rstest::rstest;
use sparse_file::{HolesUnknown, PagesUnknown};
use support::{PAGE, RAM, mount, with_lseek, with_reads};

const ALL: ControlFlow<()> = ControlFlow::Continue(());

/// Returns RAM whose pages are nonzero, except for the last eighth.
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
        dirty.mark(page * PAGE).unwrap();
    }
    dirty
}

/// Returns the number of marked pages.
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
    // SAFETY: mapped for the lifetime of `mapped`, which outlives the copy.
    let memory = unsafe { HostMemory::new(mapped.as_ptr(), mapped.ram_size() as usize) };
    memory.copy_to(&mut bytes);
    bytes
}

const REPORTS: [Lseek; 4] = [
    Lseek::Exact,
    Lseek::AllHole,
    Lseek::HoleIsEnxio,
    Lseek::DataIsEnxio,
];

fn open_chain(path: &Path, layout: Layout) -> Chain {
    match layout.has_footer() {
        true => Chain::open(path, PAGE).unwrap(),
        false => Chain::open_raw(path, PAGE).unwrap(),
    }
}

#[rstest]
#[case::raw(Layout::Raw)]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn full_images_are_read_with_any_reported_holes(#[case] layout: Layout) {
    let Some(fs) = mount(
        "full_images_are_read_with_any_reported_holes",
        Behavior::default(),
    ) else {
        return;
    };
    let (image, other) = (fs.path().join("full.mem"), fs.path().join("other.mem"));
    full(&image, layout, &ram(1));
    full(&other, layout, &ram(2));
    for report in REPORTS {
        fs.set(with_lseek(report));
        let chain = open_chain(&image, layout);
        assert!(restored(&chain) == ram(1), "{report:?}");
        assert!(mapped(&chain) == ram(1), "{report:?}");
        let flat = fs.path().join("flat.mem");
        chain.flatten(&flat).unwrap();
        assert!(std::fs::read(&flat).unwrap() == ram(1), "{report:?}");
        // All pages differ, except for the zeros of both.
        let later = open_chain(&other, layout);
        let changed = compare(&chain, &later, RAM, PAGE, &mut |_| ALL).unwrap();
        assert_eq!(pages(&changed), RAM / 8 * 7 / PAGE, "{report:?}");
    }
}

/// Bytes between the pages of a sealed image are treated as data, so that verification reads them.
#[test]
fn verify_finds_bytes_between_pages_with_any_holes() {
    const TEST: &str = "verify_finds_bytes_between_pages_with_any_holes";
    let Some(fs) = mount(TEST, Behavior::default()) else {
        return;
    };
    let image = fs.path().join("full.mem");
    full(&image, Layout::Sealed, &ram(1));
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9], RAM - PAGE).unwrap();
    for report in REPORTS {
        fs.set(with_lseek(report));
        let found = Image::open(&image).unwrap().verify(&mut |_| ALL);
        let damage = found.unwrap().damage;
        assert_eq!(damage.len(), 1, "{report:?}");
        assert_eq!(damage[0].offset(), RAM - PAGE, "{report:?}");
    }
}

/// A reader that counts its reads.
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
        Behavior::default(),
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
                source: WriteAmbiguity::Holes(PagesUnknown::Holes(
                    HolesUnknown::FileSystem { file_system }
                )),
                ..
            } if file_system == "fuse"
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("Layout::Packed"), "{error}");
    assert_eq!(reader.1.get(), 0);
    // Nothing was written, so a full image still can be written.
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
        Behavior::default(),
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
    for report in REPORTS {
        fs.set(with_lseek(report));
        let mut chain = Chain::open_raw(&base, PAGE).unwrap();
        let error = chain.push_raw(&diff).unwrap_err();
        assert!(
            matches!(
                error,
                ChainError::AmbiguousDiff {
                    why: memory_image::ReadAmbiguity::Holes(PagesUnknown::Holes(
                        HolesUnknown::FileSystem { .. }
                    )),
                    ..
                }
            ),
            "{error:?}"
        );
        // The caller provides the pages of the diff.
        chain
            .push_pages(&diff, [3, 9].map(|page| page * PAGE..(page + 1) * PAGE))
            .unwrap();
        let mut expected = ram(1);
        for page in [3, 9] {
            let page = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            expected[page.clone()].copy_from_slice(&ram(2)[page]);
        }
        assert!(restored(&chain) == expected, "{report:?}");
    }
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn sealed_and_packed_diffs_need_no_holes(#[case] layout: Layout) {
    let Some(fs) = mount(
        "sealed_and_packed_diffs_need_no_holes",
        with_lseek(Lseek::AllHole),
    ) else {
        return;
    };
    let (base, diff) = (fs.path().join("full.mem"), fs.path().join("diff.mem"));
    full(&base, layout, &ram(1));
    let parent = Image::open(&base).unwrap().id().unwrap();
    let mut writer = MemoryWriter::options()
        .layout(layout)
        .seal(Seal::new().parent(parent))
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

/// Runs `check` for every layout, on a file system with the given results of reads.
fn for_each_layout(fs: &MisbehavingFs, reads: Reads, check: impl Fn(Chain, &str)) {
    for layout in Layout::ALL {
        let name = layout.name();
        fs.set(Behavior::default());
        let path = fs.path().join(name);
        full(&path, layout, &ram(1));
        fs.set(with_reads(reads));
        check(open_chain(&path, layout), name);
    }
}

#[test]
fn short_reads_are_continued() {
    let Some(fs) = mount("short_reads_are_continued", Behavior::default()) else {
        return;
    };
    for_each_layout(&fs, Reads::Short, |chain, name| {
        assert!(restored(&chain) == ram(1), "{name}");
    });
}

#[test]
fn a_read_error_inside_an_image_is_reported_with_its_offset() {
    let Some(fs) = mount(
        "a_read_error_inside_an_image_is_reported_with_its_offset",
        Behavior::default(),
    ) else {
        return;
    };
    let bad = 2 << 20;
    for_each_layout(&fs, Reads::FailAt(bad), |chain, name| {
        let mut ram = vec![0; RAM as usize];
        let error = chain.restore_zeroed(ram.as_mut_slice()).unwrap_err();
        let RestoreError::Read(ReadImageError::Read { offset, source, .. }) = &error else {
            panic!("{name}: {error:?}");
        };
        assert_eq!(source.raw_os_error(), Some(libc::EIO), "{name}");
        assert!((bad - (1 << 20)..=bad).contains(offset), "{name}: {offset}");
    });
}
