//! Links of sealed and packed images, and images that do not follow each other.

mod support;

use std::path::{Path, PathBuf};

use memory_image::{
    Chain, ChainError, FooterError, Image, LinkError, MapError, MappedImage, OpenImageError,
};
use memory_writer::{Layout, Seal};
use support::sealed_guest::{Guest, PAGE, SIZE, diff_with_zeros, options, whole};

#[test]
fn link_error_names_the_diff_and_the_reason() {
    let guest = Guest::with_history(Layout::Sealed);
    let [base, one, two, three] = &guest.snapshots[..] else {
        panic!("four snapshots");
    };
    let why = |paths: &[&PathBuf]| match Chain::open_sealed(paths) {
        Err(ChainError::Link { path, newest, why }) => {
            assert_eq!(&path, *paths.last().unwrap());
            assert_eq!(&newest, paths[paths.len() - 2]);
            why
        }
        other => panic!("{other:?}"),
    };
    assert!(matches!(why(&[base, two]), LinkError::Missing { .. }));
    assert!(matches!(why(&[base, one, one]), LinkError::Repeated));
    assert!(matches!(why(&[base, one, two, base]), LinkError::Repeated));
    assert!(matches!(
        why(&[base, one, three]),
        LinkError::Missing { .. }
    ));
    assert!(matches!(why(&[one, two, base]), LinkError::Full));

    // A branch: a second diff with the same parent.
    let branch = guest.path("branch");
    diff_with_zeros(&branch, Image::open(base).unwrap().id(), Layout::Packed);
    let parent = base.clone();
    assert_eq!(why(&[base, one, &branch]), LinkError::Reordered { parent });

    let orphan = guest.path("orphan");
    diff_with_zeros(&orphan, None, Layout::Packed);
    assert_eq!(why(&[base, &orphan]), LinkError::NoParent);

    // The base was taken again: another state and another id.
    let again = Guest::with_history(Layout::Sealed);
    assert!(matches!(
        why(&[&again.snapshots[0], one]),
        LinkError::Missing { .. }
    ));
}

#[test]
fn images_of_other_guests_are_refused() {
    let guest = Guest::with_history(Layout::Sealed);
    let other = guest.path("other");
    let regions = [0..PAGE, 1 << 32..(1 << 32) + SIZE - PAGE];
    let seal = Seal::new().parent(guest.newest.unwrap()).regions(regions);
    let mut writer = options(Layout::Packed, seal)
        .open(&other, SIZE, PAGE)
        .unwrap();
    writer.write_diff(&guest.ram, &guest.dirty).unwrap();
    writer.commit().unwrap();
    let error = guest.chain().push(&other).unwrap_err();
    assert!(
        matches!(error, ChainError::RegionsDiffer { .. }),
        "{error:?}"
    );

    let seal = Seal::new().parent(guest.newest.unwrap());
    let mut writer = options(Layout::Packed, seal)
        .open(&other, SIZE, 2048)
        .unwrap();
    writer.write_diff(&guest.ram, &guest.dirty).unwrap();
    writer.commit().unwrap();
    let error = guest.chain().push(&other).unwrap_err();
    assert!(
        matches!(
            error,
            ChainError::PageSizeDiffers {
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
    let raw_file = guest.save(Layout::Raw);
    assert!(matches!(
        Image::open(&raw_file),
        Err(OpenImageError::Footer {
            source: FooterError::NotSealed,
            ..
        })
    ));
    let sealed = Guest::with_history(Layout::Sealed);
    let diff = &sealed.snapshots[1];
    assert!(matches!(
        Chain::open(diff, PAGE),
        Err(ChainError::NotFull(_))
    ));
    assert!(matches!(MappedImage::open(diff), Err(MapError::NotFull(_))));
    assert!(matches!(
        Chain::open_sealed::<&Path>(&[]),
        Err(ChainError::NoImages)
    ));
}
