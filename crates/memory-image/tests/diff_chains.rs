//! Chains of diffs without a full image: covered pages and refused operations.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, CompareError, Image, MergeError, ReadImageError, compare};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal, SnapshotError};
use page_reader::PageReader;
use rstest::rstest;

const PAGE: u64 = 4096;
const SIZE: u64 = 1 << 20;

fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .durability(Durability::None)
        .allow_ambiguous_diff(true)
}

/// Writes a diff of these pages, filled with `value`.
fn diff(path: &Path, layout: Layout, seal: Seal, value: u8, pages: &[u64]) {
    let dirty = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    for page in pages {
        dirty.mark(page * PAGE).unwrap();
    }
    let mut writer = options(layout, seal).open(path, SIZE, PAGE).unwrap();
    writer
        .write_diff(&vec![value; SIZE as usize], &dirty)
        .unwrap();
    writer.commit().unwrap();
}

/// Returns a chain of two diffs: page 1 is 2, pages 2 and 9 are 3, page 3 is zeros.
fn diffs(dir: &Path, layout: Layout) -> Chain {
    let path = |name: &str| -> PathBuf { dir.join(name) };
    let sealed = layout.has_footer();
    let parent = Seal::new().on_raw_image();
    diff(&path("first"), layout, parent, 2, &[1, 2]);
    diff(&path("zeros"), layout, on(&path("first"), sealed), 0, &[3]);
    diff(
        &path("last"),
        layout,
        on(&path("zeros"), sealed),
        3,
        &[2, 9],
    );
    if sealed {
        return Chain::open_sealed(&[path("first"), path("zeros"), path("last")]).unwrap();
    }
    let first = Image::open_raw(path("first")).unwrap();
    let (mut chain, _) = Chain::from_diff_trusting_holes(first, PAGE).unwrap();
    chain.push_trusting_holes(path("zeros")).unwrap();
    chain.push_trusting_holes(path("last")).unwrap();
    chain
}

/// Returns the seal of a diff that was taken after this image.
fn on(parent: &Path, sealed: bool) -> Seal {
    match sealed {
        true => Seal::new().parent(Image::open(parent).unwrap().id().unwrap()),
        false => Seal::new(),
    }
}

#[rstest]
#[case::raw_diffs(Layout::Raw)]
#[case::sealed_diffs(Layout::Sealed)]
#[case::packed_diffs(Layout::Packed)]
fn page_in_no_diff_is_an_error_and_not_zeros(#[case] layout: Layout) {
    let dir = tempfile::tempdir().unwrap();
    let chain = diffs(dir.path(), layout);
    for (page, value) in [(1, 2), (2, 3), (3, 0), (9, 3)] {
        let mut bytes = [0xee; PAGE as usize];
        chain.read_at(page * PAGE, &mut bytes).unwrap();
        assert_eq!(bytes, [value; PAGE as usize], "page {page}");
    }
    let unknown = |offset: u64, len: u64| {
        let error = chain.read_at(offset, &mut vec![0; len as usize]);
        let error = error.unwrap_err().downcast::<ReadImageError>().unwrap();
        assert!(error.to_string().contains("none of the diffs"), "{error}");
        match error {
            ReadImageError::NotInDiffs { offset, .. } => offset / PAGE,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(unknown(0, 1), 0);
    assert_eq!(unknown(PAGE - 1, 2), 0);
    assert_eq!(unknown(3 * PAGE, 2 * PAGE), 4);
    assert_eq!(unknown(7 * PAGE + 5, 10), 7);
    assert_eq!(unknown(SIZE - 1, 1), SIZE / PAGE - 1);
}

#[test]
fn chain_of_diffs_is_not_treated_as_full() {
    let dir = tempfile::tempdir().unwrap();
    let chain = diffs(dir.path(), Layout::Packed);
    let full = vec![1; SIZE as usize];
    let sources: [&(dyn PageReader + Sync); 2] = [&full, &chain];
    for (older, newer) in [(sources[0], sources[1]), (sources[1], sources[0])] {
        let compared = compare(older, newer, SIZE, PAGE, &mut |_| ControlFlow::Continue(()));
        assert!(
            matches!(compared, Err(CompareError::Read { .. })),
            "{compared:?}"
        );
    }
    for layout in Layout::ALL {
        let path = dir.path().join("full");
        let mut writer = options(layout, Seal::new())
            .open(&path, SIZE, PAGE)
            .unwrap();
        let written = writer.write_full(&chain);
        assert!(
            matches!(written, Err(SnapshotError::MemoryIo { .. })),
            "{written:?}"
        );
        assert!(writer.commit().is_err());
        assert!(!path.exists());
    }
}

#[rstest]
fn merged_diff_holds_the_pages_of_its_diffs(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] from: Layout,
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] to: Layout,
    #[values(512, PAGE)] page: u64,
) {
    let dir = tempfile::tempdir().unwrap();
    let chain = diffs(dir.path(), from);
    let merged = dir.path().join("merged");
    let mut writer = options(to, chain.seal()).open(&merged, SIZE, page).unwrap();
    assert_eq!(chain.write_to(&mut writer).unwrap(), 4 * PAGE);
    writer.commit().unwrap();
    let merged = match to.has_footer() {
        true => Chain::open_diff(&merged, page).unwrap(),
        false => {
            let image = Image::open_raw(&merged).unwrap();
            Chain::from_diff_trusting_holes(image, PAGE).unwrap().0
        }
    };
    assert!(merged.covered_runs().eq(chain.covered_runs()));
    for run in chain.covered_runs() {
        let mut bytes = [0, 1].map(|byte| vec![byte; (run.end - run.start) as usize]);
        chain.read_at(run.start, &mut bytes[0]).unwrap();
        merged.read_at(run.start, &mut bytes[1]).unwrap();
        assert!(bytes[0] == bytes[1], "{run:x?}");
    }
}

#[rstest]
fn chain_of_diffs_is_not_written_in_larger_pages(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] from: Layout,
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] to: Layout,
) {
    let dir = tempfile::tempdir().unwrap();
    let chain = diffs(dir.path(), from);
    let merged = dir.path().join("merged");
    let mut writer = options(to, chain.seal())
        .open(&merged, SIZE, 16 * PAGE)
        .unwrap();
    let error = chain.write_to(&mut writer).unwrap_err();
    assert!(
        matches!(
            error,
            MergeError::LargerPages {
                writer: 65536,
                chain: 4096
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("at most 4096 bytes"), "{error}");
    let committed = writer.commit();
    assert!(
        matches!(committed, Err(SnapshotError::NothingWritten { .. })),
        "{committed:?}"
    );
    assert!(!merged.exists());
}

/// A full chain knows all of the memory, so no page size is too large.
#[rstest]
fn full_chain_is_written_in_larger_pages(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let seal = Seal::new();
    let mut writer = options(Layout::Packed, seal)
        .open(path("full"), SIZE, PAGE)
        .unwrap();
    writer.write_full(&vec![1; SIZE as usize]).unwrap();
    writer.commit().unwrap();
    diff(
        &path("diff"),
        Layout::Packed,
        on(&path("full"), true),
        2,
        &[1],
    );
    let chain = Chain::open_sealed(&[path("full"), path("diff")]).unwrap();
    let mut writer = options(layout, chain.seal())
        .open(path("merged"), SIZE, 16 * PAGE)
        .unwrap();
    chain.write_to(&mut writer).unwrap();
    writer.commit().unwrap();
    let merged = match layout.has_footer() {
        true => Chain::open(path("merged"), PAGE).unwrap(),
        false => Chain::open_raw(path("merged"), PAGE).unwrap(),
    };
    let byte = |page: u64| {
        let mut byte = [0];
        merged.read_at(page * PAGE, &mut byte).unwrap();
        byte[0]
    };
    assert_eq!([0, 1, 2, 255].map(byte), [1, 2, 1, 1]);
}
