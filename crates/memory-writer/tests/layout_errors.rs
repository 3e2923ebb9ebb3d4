//! Sealed and packed snapshots that are refused, before pages are written if possible.

mod support;

use std::io;
use std::ops::Range;

use dirty_bitmap::DirtyBitmap;
use image_format::ImageKind;
use memory_writer::{
    FooterError, ImageId, Layout, MemoryIoStep, PackedStream, Seal, SnapshotError,
};
use rstest::rstest;
use support::images::{PAGE, applied, dirty, options};
use support::{Place, Until, pattern};

#[test]
fn raw_layout_refuses_metadata_and_full_refuses_a_parent() {
    let place = Place::new();
    let open = |layout, seal| {
        options(layout, seal)
            .open(&place.dest, 1 << 20, PAGE)
            .unwrap()
    };
    let ram = vec![0; 1 << 20];

    let parent = Seal::new().parent(ImageId::from_bytes([1; 16]));
    let mut writer = open(Layout::Sealed, parent);
    let error = writer
        .write_full(&ram)
        .expect_err("a full snapshot has no parent");
    assert!(matches!(error, SnapshotError::FullWithParent { .. }));
    drop(writer);

    let mut writer = open(Layout::Raw, Seal::new());
    assert_eq!(writer.image_id(), None);
    let error = writer
        .set_metadata(b"state".to_vec())
        .expect_err("no place for it");
    assert!(matches!(error, SnapshotError::NotSealed { .. }));
    drop(writer);
    let seal = Seal::new().metadata(b"state".to_vec());
    let refused = options(Layout::Raw, seal).open(&place.dest, 1 << 20, PAGE);
    assert!(matches!(refused, Err(SnapshotError::NotSealed { .. })));

    place.assert_untouched();
}

/// Errors that are known before a byte is written are returned then.
#[rstest]
#[case::regions_too_small(Seal::new().regions([0..4096]))]
#[case::regions_not_ascending(Seal::new().regions([1 << 20..(1 << 20) + (512 << 10), 0..512 << 10]))]
#[case::too_much_metadata(Seal::new().metadata(vec![0; (16 << 20) + 1]))]
fn invalid_seal_is_refused_at_open(
    #[case] seal: Seal,
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let place = Place::new();
    let error = options(layout, seal)
        .open(&place.dest, 1 << 20, PAGE)
        .unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::Seal {
                source: FooterError::Invalid(_),
                ..
            }
        ),
        "{error:?}"
    );
    place.assert_untouched();
}

#[test]
fn too_much_metadata_leaves_the_writer_usable() {
    let place = Place::new();
    let seal = Seal::new().metadata(b"before".to_vec());
    let mut writer = options(Layout::Packed, seal)
        .open(&place.dest, 1 << 20, PAGE)
        .unwrap();
    let error = writer.set_metadata(vec![0; (16 << 20) + 1]).unwrap_err();
    assert!(matches!(error, SnapshotError::Seal { .. }), "{error:?}");
    writer.write_full(&vec![1; 1 << 20]).unwrap();
    writer.commit().unwrap();
    let (footer, _) = applied(&place.dest, vec![0; 1 << 20]);
    assert_eq!(footer.metadata, b"before");
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn sealed_diff_without_a_parent_is_refused_before_writes(#[case] layout: Layout) {
    let place = Place::new();
    let ram = pattern(1 << 20, 1);
    let open = |seal| {
        options(layout, seal)
            .open(&place.dest, 1 << 20, PAGE)
            .unwrap()
    };
    let mut writer = open(Seal::new());
    let error = writer.write_diff(&ram, &dirty(1 << 20, &[3])).unwrap_err();
    assert!(
        matches!(error, SnapshotError::DiffWithoutParent { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("Seal::parent"), "{error}");
    // The writer is unchanged: a full snapshot needs no parent, and pages may be written again.
    writer.write_full(&ram).unwrap();
    writer.write_diff(&ram, &dirty(1 << 20, &[3])).unwrap();
    writer.commit().unwrap();
    assert_eq!(
        applied(&place.dest, vec![0; 1 << 20]).0.kind,
        ImageKind::Full
    );

    let mut writer = open(Seal::new().on_raw_image());
    writer.write_diff(&ram, &dirty(1 << 20, &[3])).unwrap();
    writer.commit().unwrap();
    let kind = ImageKind::Diff { parent: None };
    assert_eq!(applied(&place.dest, vec![0; 1 << 20]).0.kind, kind);
}

/// Every other page of 46 GiB: its footer would have 48 million runs.
const OVER: (u64, u64) = (46 << 30, 512);

struct Unread;

impl page_reader::PageReader for Unread {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("no page is read")
    }
}

fn runs_over() -> impl Iterator<Item = Range<u64>> {
    let (size, page) = OVER;
    (0..size / page / 2).map(move |run| run * 2 * page..(run * 2 + 1) * page)
}

fn assert_too_large(error: &SnapshotError) {
    assert!(
        matches!(
            error,
            SnapshotError::Seal {
                source: FooterError::TooLarge { .. },
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn footer_over_its_limit_is_refused_before_writes() {
    let (place, (size, page)) = (Place::new(), OVER);
    let seal = Seal::new().on_raw_image();
    let mut writer = options(Layout::Packed, seal.clone())
        .open(&place.dest, size, page)
        .unwrap();
    assert_too_large(&writer.write_zeros(runs_over).unwrap_err());
    assert!(
        matches!(writer.commit(), Err(SnapshotError::NothingWritten { .. })),
        "nothing was begun"
    );
    place.assert_untouched();

    let mut out = Vec::new();
    let stream = PackedStream::options().seal(seal);
    let mut stream = stream.open(&mut out, size, page).unwrap();
    assert_too_large(&stream.write_runs(&Unread, runs_over).unwrap_err());
    drop(stream);
    assert!(out.is_empty());
}

/// The set of these pages takes seconds to build. The limit is tested with fewer runs in
/// `src/footer_limit.rs`.
#[test]
fn diff_over_the_limit_of_its_footer_is_refused_before_writes() {
    if !test_machine::thorough() {
        return;
    }
    let (place, (size, page)) = (Place::new(), OVER);
    let dirty = DirtyBitmap::new(0, size, page).unwrap();
    let words = vec![0x5555_5555_5555_5555; (size / page / 64) as usize];
    dirty.mark_dirty_log(0, page, &words).unwrap();
    let mut writer = options(Layout::Packed, Seal::new().on_raw_image())
        .open(&place.dest, size, page)
        .unwrap();
    assert_too_large(&writer.write_diff(&Unread, &dirty).unwrap_err());
    assert!(
        matches!(writer.commit(), Err(SnapshotError::NothingWritten { .. })),
        "nothing was begun"
    );
    place.assert_untouched();
}

#[test]
fn read_error_of_a_packed_diff_names_the_offset_in_ram() {
    let place = Place::new();
    let reader = Until {
        ram: vec![1; 1 << 20],
        offset: 200 * PAGE,
        then: || io::Error::other("planted"),
    };
    let mut writer = options(Layout::Packed, Seal::new().on_raw_image())
        .open(&place.dest, 1 << 20, PAGE)
        .unwrap();
    let error = writer
        .write_diff(&reader, &dirty(1 << 20, &[10, 220]))
        .expect_err("it fails");
    let SnapshotError::MemoryIo {
        step: MemoryIoStep::Read,
        offset,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    // Page 10 is read in the same request.
    assert_eq!(offset, 220 * PAGE);
    assert!(matches!(
        writer.commit(),
        Err(SnapshotError::Incomplete { .. })
    ));
    place.assert_untouched();
}
