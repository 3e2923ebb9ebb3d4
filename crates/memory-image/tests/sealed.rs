//! Reads, links, verifies, merges and copies sealed and packed images.

use std::fs::{self, File};
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use dirty_bitmap::DirtyBitmap;
use image_format::{Checksums, Footer, Kind, Placement, Run, Version, packed_start};
use memory_image::{
    Chain, CompareError, Damage, FooterError, Image, ImageError, ImageId, Link, MappedChain,
    MappedImage, Verified, compare,
};
use memory_writer::{Durability, Layout, MemoryWriter, Options, Seal};
use page_reader::{PageReader, PopulatedRanges};
use proptest::prelude::*;
use rstest::rstest;

const PAGE: u64 = 4096;
const SIZE: u64 = 3 << 20;

type Make = fn(Seal) -> Layout;

fn raw(_: Seal) -> Layout {
    Layout::Raw
}

/// A guest with dirty tracking, and its snapshots.
struct Guest {
    dir: tempfile::TempDir,
    ram: Vec<u8>,
    dirty: DirtyBitmap,
    snapshots: Vec<PathBuf>,
    newest: Option<ImageId>,
}

fn options(layout: Layout) -> Options {
    MemoryWriter::options()
        .layout(layout)
        .durability(Durability::None)
}

impl Guest {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            ram: vec![0; SIZE as usize],
            dirty: DirtyBitmap::new(0, SIZE, PAGE).unwrap(),
            snapshots: Vec::new(),
            newest: None,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&mut self, at: u64, len: u64, value: u8) {
        let end = (at + len).min(SIZE);
        self.ram[at as usize..end as usize].fill(value);
        self.dirty.set_range(at, end - at).unwrap();
    }

    fn save(&mut self, make: Make) -> PathBuf {
        let path = self.path(&format!("{}.mem", self.snapshots.len()));
        let taken = self.dirty.drain().unwrap();
        let seal = match self.newest {
            Some(parent) => Seal::new().parent(parent),
            None => Seal::new(),
        };
        let mut writer = options(make(seal))
            .skip_zeros(true)
            .open(&path, SIZE, PAGE)
            .unwrap();
        if self.snapshots.is_empty() {
            writer.write_full(&self.ram).unwrap();
        } else {
            writer.write_diff(&self.ram, &taken).unwrap();
        }
        self.newest = writer.image_id();
        writer.commit().unwrap();
        self.snapshots.push(path.clone());
        path
    }

    /// Takes a full image and three diffs. The second diff zeroes what the first wrote.
    fn with_history(make: Make) -> Self {
        let mut guest = Self::new();
        guest.write(PAGE, SIZE / 2, 1);
        guest.save(make);
        guest.write(3 * PAGE + 100, 5000, 2);
        guest.write(SIZE - 1, 1, 2);
        guest.save(make);
        guest.write(3 * PAGE, PAGE, 0);
        guest.save(make);
        guest.write(40 * PAGE, 2 * PAGE, 4);
        guest.write(255 * PAGE, 2 * PAGE, 5);
        guest.save(make);
        guest
    }

    fn chain(&self) -> Chain {
        Chain::open_sealed(&self.snapshots).unwrap()
    }
}

fn whole(reader: &impl PageReader) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE as usize];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}

fn verify(path: &Path) -> Result<Verified, ImageError> {
    Image::open(path)?.verify(&|_, _| ControlFlow::Continue(()))
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn sealed_chain_reads_and_restores_as_its_last_ram(#[case] make: Make) {
    let guest = Guest::with_history(make);
    let chain = guest.chain();
    assert_eq!(
        (chain.len(), chain.page_size(), chain.is_full()),
        (4, PAGE, true)
    );
    assert_eq!(chain.id(), guest.newest);
    assert!(whole(&chain) == guest.ram);
    let mut ram = vec![0; SIZE as usize];
    chain.restore_zeroed(ram.as_mut_slice()).unwrap();
    assert!(ram == guest.ram);
    assert_starts_as(&chain, &guest.ram);
    let mut odd = [0; 9000];
    chain.read_at(3 * PAGE - 1, &mut odd).unwrap();
    assert!(odd == guest.ram[3 * PAGE as usize - 1..][..9000]);
    for path in &guest.snapshots {
        let found = verify(path).unwrap();
        assert!(found.is_whole() && found.bytes > 0, "{path:?}: {found:?}");
    }
    let full = verify(&guest.snapshots[0]).unwrap();
    assert_eq!((full.chunks, full.bytes), (2, 385 * PAGE));
    assert!(chain.images().all(|image| image.ram_size() == SIZE));
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn pages_that_were_dirty_together_may_be_zeros_in_part(#[case] make: Make) {
    let mut guest = Guest::with_history(make);
    guest.write(10 * PAGE, 3 * PAGE, 6);
    guest.write(12 * PAGE, PAGE, 0);
    guest.save(make);
    let chain = guest.chain();
    assert!(whole(&chain) == guest.ram);
    assert_starts_as(&chain, &guest.ram);
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn full_image_may_have_zeros_between_its_pages(#[case] make: Make) {
    let mut guest = Guest::new();
    guest.write(PAGE, 4 * PAGE, 1);
    guest.write(9 * PAGE, 3 * PAGE, 2);
    guest.save(make);
    let chain = guest.chain();
    assert!(whole(&chain) == guest.ram);
    assert_starts_as(&chain, &guest.ram);
}

#[test]
fn chain_may_mix_layouts_with_raw_diffs_on_top() {
    let mut guest = Guest::new();
    guest.write(0, SIZE / 3, 1);
    guest.save(Layout::Packed);
    guest.write(77, 9000, 2);
    guest.save(Layout::Sealed);
    guest.write(SIZE / 2, 9000, 3);
    guest.save(Layout::Packed);
    guest.write(SIZE / 2, 100, 0);
    guest.save(raw);
    let mut chain = Chain::open_sealed(&guest.snapshots[..3]).unwrap();
    chain.push_raw(&guest.snapshots[3]).unwrap();
    assert!(whole(&chain) == guest.ram);
    assert_eq!(chain.id(), None, "a raw image names no state");
}

/// Asserts that a guest that starts from the unmerged chain has this RAM.
fn assert_starts_as(chain: &Chain, ram: &[u8]) {
    for most in [1, 5, 16_384] {
        let mapped = MappedChain::options()
            .max_mappings(most)
            .map(chain)
            .unwrap();
        assert!(whole(&mapped) == ram, "at most {most} mappings");
    }
    #[cfg(target_os = "linux")]
    if test_machine::Need::Userfaultfd.met("a sealed chain in LazyRam") {
        let paths: Vec<_> = chain.paths().collect();
        let lazy = memory_image::LazyRam::options()
            .start(Chain::open_sealed(&paths).unwrap())
            .unwrap();
        assert!(whole(&lazy) == ram);
        lazy.wait().unwrap();
        assert!(whole(&lazy) == ram);
    }
}

/// Writes a diff with a hand-made footer: pages 1 and 2 are zeros, page 5 is present.
fn diff_with_zeros(path: &Path, parent: Option<ImageId>, placement: Placement) -> Footer {
    let file = File::create(path).unwrap();
    let at = match placement {
        Placement::InPlace => 5 * PAGE,
        Placement::Packed => packed_start(PAGE),
    };
    let bytes = [9; PAGE as usize];
    file.write_all_at(&bytes, at).unwrap();
    let mut checksums = Checksums::new(SIZE);
    checksums.feed(5 * PAGE, &bytes);
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::random().unwrap(),
        kind: Kind::Diff { parent },
        placement,
        ram_size: SIZE,
        page_size: PAGE,
        regions: vec![0..SIZE],
        runs: vec![
            Run::zeros(PAGE..3 * PAGE),
            Run::present(5 * PAGE..6 * PAGE, at),
        ],
        checksums: checksums.finish(),
        metadata: Vec::new(),
    };
    footer.write(&file).unwrap();
    footer
}

#[rstest]
#[case::in_place(Placement::InPlace)]
#[case::packed(Placement::Packed)]
fn zeros_of_a_diff_are_neither_clean_nor_read(#[case] placement: Placement) {
    let guest = Guest::with_history(Layout::Sealed);
    let diff = guest.path("zeros");
    diff_with_zeros(&diff, guest.newest, placement);
    let mut chain = guest.chain();
    chain.push(&diff).unwrap();
    let mut expected = guest.ram.clone();
    expected[PAGE as usize..3 * PAGE as usize].fill(0);
    expected[5 * PAGE as usize..6 * PAGE as usize].fill(9);
    assert!(whole(&chain) == expected);
    assert!(
        chain
            .stored_runs()
            .all(|run| run.end <= PAGE || run.start >= 3 * PAGE)
    );
    assert!(chain.known_runs().any(|run| run.contains(&PAGE)));
    let flat = guest.path("flat");
    chain.flatten(&flat).unwrap();
    assert!(fs::read(&flat).unwrap() == expected);
}

#[rstest]
#[case::to_raw(raw)]
#[case::to_sealed(Layout::Sealed)]
#[case::to_packed(Layout::Packed)]
fn merged_chain_keeps_its_id_and_accepts_the_next_diff(#[case] make: Make) {
    let mut guest = Guest::with_history(Layout::Packed);
    let chain = guest.chain();
    let merged = guest.path("merged");
    let bytes = chain.merge(options(make(chain.seal())), &merged).unwrap();
    assert_eq!(
        bytes,
        386 * PAGE,
        "pages 0 to 384, as a zero page alone is stored, and 767"
    );
    guest.write(8 * PAGE, 10, 7);
    let next = guest.save(Layout::Packed);
    let image = Image::open(&merged).or_else(|_| Image::open_raw(&merged));
    let mut whole_chain = Chain::from_image(image.unwrap(), PAGE).unwrap();
    match whole_chain.id() {
        Some(_) => {
            assert!(verify(&merged).unwrap().is_whole());
            whole_chain.push(&next).unwrap();
            assert!(whole(&whole_chain) == guest.ram);
        }
        None => {
            let error = whole_chain.push(&next).unwrap_err();
            assert!(
                matches!(
                    error,
                    ImageError::Link {
                        why: Link::OnRaw { .. },
                        ..
                    }
                ),
                "{error:?}"
            );
        }
    }
}

#[rstest]
#[case::to_sealed(Layout::Sealed)]
#[case::to_packed(Layout::Packed)]
fn merged_diff_replaces_all_its_diffs(#[case] make: Make) {
    let mut guest = Guest::with_history(Layout::Sealed);
    let diffs = Chain::open_sealed(&guest.snapshots[1..]).unwrap();
    assert!(!diffs.is_full());
    let merged = guest.path("merged");
    let bytes = diffs.merge(options(make(diffs.seal())), &merged).unwrap();
    assert_eq!(bytes, 7 * PAGE);
    let footer = Image::open(&merged).unwrap().footer().cloned().unwrap();
    assert_eq!(
        footer.present_bytes(),
        7 * PAGE,
        "pages 3, 4, 40, 41, 255, 256, 767"
    );

    let mut chain = Chain::open_sealed(&[&guest.snapshots[0], &merged]).unwrap();
    assert!(whole(&chain) == guest.ram);
    guest.write(99 * PAGE, 10, 7);
    chain.push(guest.save(Layout::Packed)).unwrap();
    assert!(whole(&chain) == guest.ram);

    let error = diffs
        .restore(vec![0; SIZE as usize].as_mut_slice())
        .unwrap_err();
    assert!(matches!(error, ImageError::NotFull { .. }));
    let error = diffs.flatten(guest.path("flat")).unwrap_err();
    assert!(matches!(error, ImageError::NotFull { .. }));
    // Pages that no diff holds are not known to be zeros.
    assert!(diffs.populated(PAGE..SIZE).eq([PAGE..SIZE]));
    assert_eq!(diffs.populated(PAGE..PAGE).count(), 0);
}

#[test]
fn link_error_names_the_diff_and_the_reason() {
    let guest = Guest::with_history(Layout::Sealed);
    let [base, one, two, three] = &guest.snapshots[..] else {
        panic!("four snapshots");
    };
    let why = |paths: &[&PathBuf]| match Chain::open_sealed(paths) {
        Err(ImageError::Link { path, newest, why }) => {
            assert_eq!(&path, *paths.last().unwrap());
            assert_eq!(&newest, paths[paths.len() - 2]);
            why
        }
        other => panic!("{other:?}"),
    };
    assert!(matches!(why(&[base, two]), Link::Missing { .. }));
    assert!(matches!(why(&[base, one, one]), Link::Repeated));
    assert!(matches!(why(&[base, one, two, base]), Link::Repeated));
    assert!(matches!(why(&[base, one, three]), Link::Missing { .. }));
    assert!(matches!(why(&[one, two, base]), Link::Full));

    // A branch: a second diff with the same parent.
    let branch = guest.path("branch");
    diff_with_zeros(&branch, Image::open(base).unwrap().id(), Placement::Packed);
    let parent = base.clone();
    assert_eq!(why(&[base, one, &branch]), Link::Reordered { parent });

    let nobody = guest.path("nobody");
    diff_with_zeros(&nobody, None, Placement::Packed);
    assert_eq!(why(&[base, &nobody]), Link::NoParent);

    // The base was taken again: another state and another id.
    let again = Guest::with_history(Layout::Sealed);
    assert!(matches!(
        why(&[&again.snapshots[0], one]),
        Link::Missing { .. }
    ));
}

#[test]
fn images_of_other_guests_are_refused() {
    let guest = Guest::with_history(Layout::Sealed);
    let other = guest.path("other");
    let regions = [0..PAGE, 1 << 32..(1 << 32) + SIZE - PAGE];
    let seal = Seal::new().parent(guest.newest.unwrap()).regions(regions);
    let mut writer = options(Layout::Packed(seal))
        .open(&other, SIZE, PAGE)
        .unwrap();
    writer.write_diff(&guest.ram, &guest.dirty).unwrap();
    writer.commit().unwrap();
    let error = guest.chain().push(&other).unwrap_err();
    assert!(
        matches!(error, ImageError::RegionsDiffer { .. }),
        "{error:?}"
    );

    let seal = Seal::new().parent(guest.newest.unwrap());
    let mut writer = options(Layout::Packed(seal))
        .open(&other, SIZE, 2048)
        .unwrap();
    writer.write_diff(&guest.ram, &guest.dirty).unwrap();
    writer.commit().unwrap();
    let error = guest.chain().push(&other).unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::PageSizeDiffers {
                image: 2048,
                chain: PAGE,
                ..
            }
        ),
        "{error:?}"
    );
    // Opened together, the chain uses the smaller page size.
    let chain = Chain::open_sealed(&[&guest.snapshots[..], &[other]].concat()).unwrap();
    assert_eq!(chain.page_size(), 2048);
    assert!(whole(&chain) == guest.ram);
}

#[test]
fn raw_file_is_not_sealed_and_diff_is_not_a_base() {
    let mut guest = Guest::new();
    let raw_file = guest.save(raw);
    assert!(matches!(
        Image::open(&raw_file),
        Err(ImageError::Footer {
            source: FooterError::NotSealed,
            ..
        })
    ));
    let sealed = Guest::with_history(Layout::Sealed);
    let diff = &sealed.snapshots[1];
    assert!(matches!(
        Chain::open(diff, PAGE),
        Err(ImageError::NotFull { .. })
    ));
    assert!(matches!(
        MappedImage::open(diff),
        Err(ImageError::NotFull { .. })
    ));
    assert!(matches!(
        Chain::open_sealed::<&Path>(&[]),
        Err(ImageError::NoImages)
    ));
}

#[test]
fn full_sealed_image_maps_and_packed_image_does_not() {
    let guest = Guest::with_history(Layout::Sealed);
    let flat = guest.path("flat");
    let chain = guest.chain();
    chain
        .merge(options(Layout::Sealed(chain.seal())), &flat)
        .unwrap();
    let mapped = MappedImage::open(&flat).unwrap();
    assert_eq!(mapped.len() as u64, SIZE);
    assert!(whole(&mapped) == guest.ram);
    chain
        .merge(options(Layout::Packed(chain.seal())), &flat)
        .unwrap();
    assert!(matches!(
        MappedImage::open(&flat),
        Err(ImageError::Packed { .. })
    ));
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn flipped_bits_are_detected_throughout_a_large_image(#[case] make: Make) {
    let guest = Guest::with_history(make);
    for path in &guest.snapshots[..2] {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let pages = Image::open(path).unwrap().footer().unwrap().data_start();
        for at in (pages..len).step_by(50_929) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            let flipped = [byte[0] ^ 1 << (at % 8)];
            file.write_all_at(&flipped, at).unwrap();
            let detected = verify(path).is_ok_and(|found| !found.is_whole());
            assert!(detected, "byte {at} of {len} in {path:?}");
            file.write_all_at(&byte, at).unwrap();
        }
        assert!(verify(path).unwrap().is_whole());
    }
}

#[test]
fn damage_is_named_by_chunk_and_offset() {
    let guest = Guest::with_history(Layout::Packed);
    let path = &guest.snapshots[0];
    let footer = Image::open(path).unwrap().footer().cloned().unwrap();
    let run = footer.run_at(300 * PAGE).unwrap();
    let at = run.stored_at(300 * PAGE).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0xff; 3], at).unwrap();
    let found = verify(path).unwrap();
    assert_eq!(found.found, 1);
    let [
        Damage::Chunk {
            number: 1,
            guest: range,
            ..
        },
    ] = &found.damages[..]
    else {
        panic!("{found:?}");
    };
    assert_eq!(*range, 1 << 20..2 << 20);
    assert_eq!(Some(found.damages[0].offset()), run.stored_at(1 << 20));

    let sealed = Guest::with_history(Layout::Sealed);
    let path = &sealed.snapshots[1];
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[1], 100 * PAGE + 77).unwrap();
    let found = verify(path).unwrap();
    assert_eq!(
        found.damages,
        [Damage::NotZero {
            offset: 100 * PAGE + 77
        }]
    );
    assert_eq!(found.damages[0].offset(), 100 * PAGE + 77);
}

#[test]
fn verification_reports_progress_and_can_be_cancelled() {
    let guest = Guest::with_history(Layout::Sealed);
    let image = Image::open(&guest.snapshots[0]).unwrap();
    let seen = std::sync::Mutex::new(Vec::new());
    image
        .verify(&|done, total| {
            seen.lock().unwrap().push((done, total));
            ControlFlow::Continue(())
        })
        .unwrap();
    let seen = seen.into_inner().unwrap();
    let total = seen[0].1;
    assert_eq!((seen[0].0, seen.last().unwrap().0), (0, total));
    let error = image.verify(&|_, _| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, ImageError::Cancelled));
}

/// Each page that is nonzero and in no run is one damage.
#[test]
fn a_thousand_damages_are_listed_and_all_are_counted() {
    const DAMAGES: u64 = 1010;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let size = 2 * DAMAGES * PAGE;
    let sealed = options(Layout::Sealed(Seal::new())).skip_zeros(true);
    let mut writer = sealed.open(&path, size, PAGE).unwrap();
    let mut ram = vec![0; size as usize];
    ram[0] = 1;
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for damage in 0..DAMAGES {
        file.write_all_at(&[1], (2 * damage + 1) * PAGE).unwrap();
    }

    let seen = std::sync::Mutex::new((0, 0));
    let image = Image::open(&path).unwrap();
    let found = image
        .verify(&|done, total| {
            *seen.lock().unwrap() = (done, total);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((found.found, found.damages.len()), (DAMAGES, 1000));
    let (done, total) = seen.into_inner().unwrap();
    assert_eq!(done, total);
    assert!(total >= PAGE + DAMAGES * PAGE, "{total}");
}

/// Copies by tools that punch holes into zeros, fill holes with zeros, or create archives.
#[rstest]
#[case::holes_dug(&["cp", "--sparse=always"])]
#[case::holes_filled(&["cp", "--sparse=never"])]
#[case::archived(&["tar"])]
#[case::archived_sparse(&["tar", "-S"])]
fn copies_of_sealed_images_restore_to_the_same_ram(#[case] tool: &[&str]) {
    for make in [raw, Layout::Sealed as Make, Layout::Packed as Make] {
        let guest = Guest::with_history(make);
        let name = |path: &Path| path.file_name().unwrap().to_owned();
        let copies = guest.path("copies");
        fs::create_dir(&copies).unwrap();
        for path in &guest.snapshots {
            let to = copies.join(name(path));
            let done = if tool[0] == "cp" {
                Command::new("cp")
                    .args(&tool[1..])
                    .arg(path)
                    .arg(&to)
                    .status()
            } else {
                let archive = guest.path("archive.tar");
                Command::new("tar")
                    .args(&tool[1..])
                    .arg("-cf")
                    .arg(&archive)
                    .arg("-C")
                    .arg(guest.dir.path())
                    .arg(name(path))
                    .status()
                    .and_then(|_| {
                        Command::new("tar")
                            .arg("-xf")
                            .arg(&archive)
                            .arg("-C")
                            .arg(&copies)
                            .status()
                    })
            };
            assert!(done.unwrap().success());
        }
        let paths: Vec<_> = guest
            .snapshots
            .iter()
            .map(|path| copies.join(name(path)))
            .collect();
        if let Ok(chain) = Chain::open_sealed(&paths) {
            assert!(whole(&chain) == guest.ram);
            continue;
        }
        // Raw: refused, or the page that became zero is taken for clean.
        let mut chain = Chain::open_raw(&paths[0], PAGE).unwrap();
        let pushed = paths[1..].iter().try_for_each(|path| chain.push_raw(path));
        let kept_holes = tool == ["tar", "-S"];
        assert!(
            pushed.is_err() || kept_holes || whole(&chain) != guest.ram,
            "{tool:?}"
        );
    }
}

#[test]
fn comparing_two_chains_yields_the_pages_of_a_diff() {
    let guest = Guest::with_history(Layout::Packed);
    let older = Chain::open_sealed(&guest.snapshots[..2]).unwrap();
    let newer = guest.chain();
    let proceed = &|_| ControlFlow::Continue(());
    let changed = compare(&older, &newer, SIZE, PAGE, proceed).unwrap();
    let runs: Vec<_> = changed.runs().collect();
    assert_eq!(
        runs,
        [
            3 * PAGE..4 * PAGE,
            40 * PAGE..42 * PAGE,
            255 * PAGE..257 * PAGE
        ]
    );
    assert!(
        compare(&newer, &newer, SIZE, PAGE, proceed)
            .unwrap()
            .is_clean()
    );
}

#[test]
fn comparison_reports_progress_cancellation_and_read_errors() {
    let guest = Guest::with_history(Layout::Packed);
    let chain = guest.chain();
    let seen = std::sync::Mutex::new(Vec::new());
    compare(&guest.ram, &chain, SIZE, PAGE, &|done| {
        seen.lock().unwrap().push(done);
        ControlFlow::Continue(())
    })
    .unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(seen.is_sorted() && seen.last() == Some(&SIZE), "{seen:?}");
    let error = compare(&guest.ram, &chain, SIZE, PAGE, &|_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, CompareError::Cancelled { .. }), "{error:?}");
    let short = &guest.ram[..2 << 20];
    let proceed = &|_| ControlFlow::Continue(());
    let error = compare(&chain, &short, SIZE, PAGE, proceed).unwrap_err();
    let CompareError::Read {
        which: "newer",
        offset,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(offset, 2 << 20);
}

/// A source of zeros that has only the second MiB. The others cannot be read.
struct OneMebibyte;

impl PageReader for OneMebibyte {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert_eq!((offset, buf.len()), (1 << 20, 1 << 20));
        buf.fill(0);
        Ok(())
    }

    fn populated(&self, _: Range<u64>) -> PopulatedRanges<'_> {
        Box::new(std::iter::once(1 << 20..2 << 20))
    }
}

#[test]
fn comparison_reads_only_populated_ranges() {
    let proceed = &|_| ControlFlow::Continue(());
    let changed = compare(&OneMebibyte, &OneMebibyte, SIZE, PAGE, proceed).unwrap();
    assert!(changed.is_clean());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(12, 48)))]

    #[test]
    fn any_chain_in_any_layout_restores_merges_and_compares(
        rounds in prop::collection::vec(
            (prop::collection::vec((0..SIZE, 1..40_000u64, 0..3u8), 0..6), any::<bool>()),
            1..6,
        ),
        split in 0..5usize,
        packed in any::<bool>(),
    ) {
        let mut guest = Guest::new();
        let mut states = vec![];
        for (writes, packed) in rounds {
            for (at, len, value) in writes {
                guest.write(at, len, value);
            }
            guest.save(if packed { Layout::Packed } else { Layout::Sealed });
            states.push(guest.ram.clone());
        }
        let chain = guest.chain();
        prop_assert!(whole(&chain) == guest.ram);
        let mut ram = vec![0; SIZE as usize];
        chain.restore_zeroed(ram.as_mut_slice()).unwrap();
        prop_assert!(ram == guest.ram);

        // Merging the part from `split` on does not change the chain.
        let split = split.min(guest.snapshots.len() - 1);
        let merged = guest.path("merged");
        let part = Chain::open_sealed(&guest.snapshots[split..]).unwrap();
        let seal = part.seal();
        part.merge(options(if packed { Layout::Packed(seal) } else { Layout::Sealed(seal) }), &merged).unwrap();
        prop_assert!(verify(&merged).unwrap().is_whole());
        let paths = [&guest.snapshots[..split], &[merged]].concat();
        let again = Chain::open_sealed(&paths).unwrap();
        prop_assert!(whole(&again) == guest.ram);
        prop_assert_eq!(again.id(), chain.id());

        let before = &states[split];
        let proceed = &|_| ControlFlow::Continue(());
        let changed = compare(before, &chain, SIZE, PAGE, proceed).unwrap();
        for page in 0..SIZE / PAGE {
            let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            let differs = before[bytes.clone()] != guest.ram[bytes];
            prop_assert_eq!(changed.is_dirty(page * PAGE).unwrap(), differs);
        }
    }
}
