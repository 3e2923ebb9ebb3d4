//! Reads, links, verifies, merges and copies sealed and packed images.

mod support;

use std::fs::{self};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;

use memory_image::{
    Chain, ChainError, Image, LinkError, MapError, MappedChain, MappedImage, MergeError,
    RestoreError, compare,
};
use memory_writer::Layout;
use page_reader::PageReader;
use proptest::prelude::*;
use rstest::rstest;
use support::sealed_guest::{Guest, PAGE, SIZE, diff_with_zeros, options, verify, whole};

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn sealed_chain_reads_and_restores_as_its_last_ram(#[case] layout: Layout) {
    let guest = Guest::with_history(layout);
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
        assert!(found.is_ok() && found.bytes > 0, "{path:?}: {found:?}");
    }
    let full = verify(&guest.snapshots[0]).unwrap();
    assert_eq!((full.chunks, full.bytes), (2, 385 * PAGE));
    assert!(chain.images().all(|image| image.ram_size() == SIZE));
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn pages_that_were_dirty_together_may_be_zeros_in_part(#[case] layout: Layout) {
    let mut guest = Guest::with_history(layout);
    guest.write(10 * PAGE, 3 * PAGE, 6);
    guest.write(12 * PAGE, PAGE, 0);
    guest.save(layout);
    let chain = guest.chain();
    assert!(whole(&chain) == guest.ram);
    assert_starts_as(&chain, &guest.ram);
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn full_image_may_have_zeros_between_its_pages(#[case] layout: Layout) {
    let mut guest = Guest::new();
    guest.write(PAGE, 4 * PAGE, 1);
    guest.write(9 * PAGE, 3 * PAGE, 2);
    guest.save(layout);
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
    guest.save(Layout::Raw);
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
}

#[rstest]
#[case::in_place(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn zeros_of_a_diff_are_neither_clean_nor_read(#[case] layout: Layout) {
    let guest = Guest::with_history(Layout::Sealed);
    let diff = guest.path("zeros");
    diff_with_zeros(&diff, guest.newest, layout);
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
    assert!(chain.covered_runs().any(|run| run.contains(&PAGE)));
    let flat = guest.path("flat");
    chain.flatten(&flat).unwrap();
    assert!(fs::read(&flat).unwrap() == expected);
}

#[rstest]
#[case::to_raw(Layout::Raw)]
#[case::to_sealed(Layout::Sealed)]
#[case::to_packed(Layout::Packed)]
fn merged_chain_keeps_its_id_and_accepts_the_next_diff(#[case] layout: Layout) {
    let mut guest = Guest::with_history(Layout::Packed);
    let chain = guest.chain();
    let merged = guest.path("merged");
    let bytes = chain.merge(options(layout, chain.seal()), &merged).unwrap();
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
            assert!(verify(&merged).unwrap().is_ok());
            whole_chain.push(&next).unwrap();
            assert!(whole(&whole_chain) == guest.ram);
        }
        None => {
            let error = whole_chain.push(&next).unwrap_err();
            assert!(
                matches!(
                    error,
                    ChainError::Link {
                        why: LinkError::OnRaw { .. },
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
fn merged_diff_replaces_all_its_diffs(#[case] layout: Layout) {
    let mut guest = Guest::with_history(Layout::Sealed);
    let diffs = Chain::open_sealed(&guest.snapshots[1..]).unwrap();
    assert!(!diffs.is_full());
    let merged = guest.path("merged");
    let bytes = diffs.merge(options(layout, diffs.seal()), &merged).unwrap();
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
    assert!(matches!(error, RestoreError::NotFull(_)));
    let error = diffs.flatten(guest.path("flat")).unwrap_err();
    assert!(matches!(error, MergeError::NotFull(_)));
    // Pages that no diff holds are not known to be zeros.
    assert!(diffs.populated(PAGE..SIZE).eq([PAGE..SIZE]));
    assert_eq!(diffs.populated(PAGE..PAGE).count(), 0);
}

#[test]
fn full_sealed_image_maps_and_packed_image_does_not() {
    let guest = Guest::with_history(Layout::Sealed);
    let flat = guest.path("flat");
    let chain = guest.chain();
    chain
        .merge(options(Layout::Sealed, chain.seal()), &flat)
        .unwrap();
    let mapped = MappedImage::open(&flat).unwrap();
    assert_eq!(mapped.ram_size(), SIZE);
    assert!(whole(&mapped) == guest.ram);
    chain
        .merge(options(Layout::Packed, chain.seal()), &flat)
        .unwrap();
    assert!(matches!(
        MappedImage::open(&flat),
        Err(MapError::Packed { .. })
    ));
}

/// Copies by tools that punch holes into zeros, fill holes with zeros, or create archives. A copy
/// that shares blocks, the default of `cp` on XFS and btrfs, would have the same holes.
#[rstest]
#[case::holes_dug(&["cp", "--reflink=never", "--sparse=always"])]
#[case::holes_filled(&["cp", "--reflink=never", "--sparse=never"])]
#[case::archived(&["tar"])]
#[case::archived_sparse(&["tar", "-S"])]
fn copies_of_sealed_images_restore_to_the_same_ram(#[case] tool: &[&str]) {
    for layout in Layout::ALL {
        let guest = Guest::with_history(layout);
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

/// Returns the layouts whose images record their pages.
fn with_footer() -> impl Strategy<Value = Layout> {
    let layouts = Layout::ALL.into_iter().filter(|layout| layout.has_footer());
    prop::sample::select(layouts.collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(12, 48)))]

    #[test]
    fn any_chain_in_any_layout_restores_merges_and_compares(
        rounds in prop::collection::vec(
            (prop::collection::vec((0..SIZE, 1..40_000u64, 0..3u8), 0..6), with_footer()),
            1..6,
        ),
        split in 0..5usize,
        merged_layout in with_footer(),
    ) {
        let mut guest = Guest::new();
        let mut states = vec![];
        for (writes, layout) in rounds {
            for (at, len, value) in writes {
                guest.write(at, len, value);
            }
            guest.save(layout);
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
        part.merge(options(merged_layout, seal), &merged).unwrap();
        prop_assert!(verify(&merged).unwrap().is_ok());
        let paths = [&guest.snapshots[..split], &[merged]].concat();
        let again = Chain::open_sealed(&paths).unwrap();
        prop_assert!(whole(&again) == guest.ram);
        prop_assert_eq!(again.id(), chain.id());

        let before = &states[split];
        let proceed = &mut |_| ControlFlow::Continue(());
        let changed = compare(before, &chain, SIZE, PAGE, proceed).unwrap();
        for page in 0..SIZE / PAGE {
            let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            let differs = before[bytes.clone()] != guest.ram[bytes];
            prop_assert_eq!(changed.is_dirty(page * PAGE).unwrap(), differs);
        }
    }
}

/// A caller without a dependency on `image-format` passes parts of a footer to its own functions.
#[test]
fn types_of_a_footer_are_named_through_this_crate() {
    use memory_image::image_format::{Checksum, ImageKind, Run, Version};

    fn parts(image: &Image) -> (Version, ImageKind, Vec<Run>, Vec<Checksum>) {
        let footer: &memory_image::Footer = image.footer().unwrap();
        let (runs, checksums) = (footer.runs.clone(), footer.checksums.clone());
        (footer.version, footer.kind, runs, checksums)
    }

    let guest = Guest::with_history(Layout::Packed);
    let (version, kind, runs, checksums) = parts(&Image::open(&guest.snapshots[0]).unwrap());
    assert_eq!((version, kind), (Version::CURRENT, ImageKind::Full));
    assert!(!runs.is_empty() && !checksums.is_empty());
    // `memory-writer`, whose errors have these types, does the same.
    let _: Option<memory_writer::image_format::InvalidFooter> = None;
}
