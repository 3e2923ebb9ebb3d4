//! Raw diffs: pages by the holes of the file, and refused diffs.

mod support;

use memory_image::{Chain, ChainError, LinkError, ReadAmbiguity};
#[cfg(target_os = "linux")]
use memory_image::{MapError, MergeError};
use sparse_file::PagesUnknown;
use support::raw_guest::{Guest, PAGE, whole};

fn ambiguity(error: ChainError) -> ReadAmbiguity {
    match error {
        ChainError::AmbiguousDiff { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn copied_diff_without_holes_requires_its_pages() {
    let (guest, diff) = Guest::with_pending_diff(1);
    std::fs::write(guest.path("dense"), std::fs::read(&diff).unwrap()).unwrap();
    let mut chain = guest.chain();
    assert!(matches!(
        ambiguity(chain.push_raw(guest.path("dense")).unwrap_err()),
        ReadAmbiguity::NoHoles
    ));
    chain
        .push_pages(guest.path("dense"), [PAGE..PAGE, 7 * PAGE..8 * PAGE])
        .unwrap();
    assert!(whole(&chain) == guest.ram);
}

#[test]
fn raw_image_is_accepted_only_once() {
    let guest = Guest::with_history();
    let mut chain = guest.chain();
    for path in &guest.snapshots {
        let error = chain.push_raw(path).unwrap_err();
        assert!(
            matches!(
                error,
                ChainError::Link {
                    why: LinkError::Repeated,
                    ..
                }
            ),
            "{error:?}"
        );
    }
    assert_eq!(chain.len(), 4);
}

#[test]
fn push_trusting_holes_returns_the_ambiguity_reason() {
    let (guest, diff) = Guest::with_pending_diff(1);
    let mut chain = guest.chain();
    assert!(chain.push_trusting_holes(&diff).unwrap().is_none());
    assert!(whole(&chain) == guest.ram);

    let dense = std::fs::read(&diff).unwrap();
    std::fs::write(guest.path("dense"), &dense).unwrap();
    let mut chain = guest.chain();
    let why = chain.push_trusting_holes(guest.path("dense")).unwrap();
    assert!(matches!(why, Some(ReadAmbiguity::NoHoles)), "{why:?}");
    assert!(whole(&chain) == dense, "clean pages are taken for zeros");
}

#[test]
fn diff_with_a_hole_inside_a_page_is_refused() {
    let (guest, diff) = Guest::with_pending_diff(2);
    let file = std::fs::File::options().write(true).open(&diff).unwrap();
    sparse_file::punch_hole(&file, 7 * PAGE + 4096..8 * PAGE).unwrap();
    let why = ambiguity(guest.chain().push_raw(&diff).unwrap_err());
    assert!(
        matches!(why, ReadAmbiguity::TornPage { offset } if offset == 7 * PAGE + 4096),
        "{why:?}"
    );
}

#[test]
fn raw_diff_with_pages_smaller_than_holes_is_refused() {
    let guest = Guest::with_history();
    let mut chain = Chain::open_raw(&guest.snapshots[0], 512).unwrap();
    let why = ambiguity(chain.push_raw(&guest.snapshots[1]).unwrap_err());
    assert!(
        matches!(
            why,
            ReadAmbiguity::Holes(PagesUnknown::Coarse { page_size: 512, .. })
        ),
        "{why:?}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn raw_diff_on_a_file_system_with_larger_blocks_is_refused() {
    use support::raw_guest::SIZE;
    use test_machine::{FileSystem, LoopMount, needs};

    needs!(Mount(FileSystem::XFS_16K));
    let guest = Guest::with_history();
    let mount = LoopMount::new(FileSystem::XFS_16K).unwrap();
    let copy = mount.path().join("diff");
    std::fs::File::create(&copy).unwrap().set_len(SIZE).unwrap();
    let mut chain = Chain::open_raw(&guest.snapshots[0], 4096).unwrap();
    chain.push_raw(&guest.snapshots[1]).unwrap(); // trust applies to one directory only
    let why = ambiguity(chain.push_raw(&copy).unwrap_err());
    assert!(
        matches!(
            why,
            ReadAmbiguity::Holes(PagesUnknown::Coarse {
                page_size: 4096,
                ..
            })
        ),
        "{why:?}"
    );
    Chain::open_raw(&guest.snapshots[0], PAGE)
        .unwrap()
        .push_raw(&copy)
        .unwrap();
}

#[test]
fn runs_of_a_finer_bitmap_select_the_written_pages() {
    let mut guest = Guest::with_history();
    guest.write(7 * PAGE + 5000, 100, 9);
    let runs: Vec<_> = guest.dirty.runs().collect();
    assert_eq!(runs, [7 * PAGE + 4096..7 * PAGE + 8192]);
    let diff = guest.save();
    guest.snapshots.pop();
    let mut chain = guest.chain();
    chain.push_pages(&diff, runs).unwrap();
    assert!(whole(&chain) == guest.ram);
}

/// Tests of links, mounts and descriptors on Linux.
#[cfg(target_os = "linux")]
mod names_and_mounts {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};

    use page_reader::PageReader;
    use rstest::rstest;
    use test_machine::{FileSystem, LoopMount, needs};

    use super::support::raw_guest::SIZE;
    use super::*;

    /// The file system of the file itself must be checked, not the one of its name.
    #[rstest]
    #[case::behind_a_link(|file: &Path, name: &Path| {
        std::os::unix::fs::symlink(file, name).unwrap();
        None
    })]
    #[case::mounted_by_itself(|file: &Path, name: &Path| {
        std::fs::File::create(name).unwrap();
        Some(FileMount::of(file, name))
    })]
    fn holes_are_judged_by_the_file_system_of_the_file_itself(
        #[case] name_it: fn(&Path, &Path) -> Option<FileMount>,
    ) {
        needs!(Mount(FileSystem::XFS_16K));
        let guest = Guest::with_history();
        let large_blocks = LoopMount::new(FileSystem::XFS_16K).unwrap();
        let (diff, name) = (large_blocks.path().join("diff"), guest.path("diff"));
        let file = std::fs::File::create(&diff).unwrap();
        file.set_len(SIZE).unwrap();
        // One dirty page. The three clean pages of the same block look like data.
        file.write_all_at(&[9; 4096], PAGE + 4096).unwrap();
        let _mount = name_it(&diff, &name);
        let mut chain = Chain::open_raw(&guest.snapshots[0], 4096).unwrap();
        let why = ambiguity(chain.push_raw(&name).unwrap_err());
        assert!(
            matches!(
                why,
                ReadAmbiguity::Holes(PagesUnknown::Coarse { .. } | PagesUnknown::MountedAlone)
            ),
            "{why:?}"
        );
    }

    /// A file that is bind-mounted over another one, as container runtimes do. Dropping it unmounts
    /// the file.
    struct FileMount(PathBuf);

    impl FileMount {
        fn of(file: &Path, over: &Path) -> Self {
            use nix::mount::{MsFlags, mount};
            let none = None::<&str>;
            mount(Some(file), over, none, MsFlags::MS_BIND, none).unwrap();
            Self(over.to_owned())
        }
    }

    impl Drop for FileMount {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }

    /// Service managers and sandboxes pass descriptors. No file can be created beside such a name.
    #[test]
    fn diff_may_be_opened_by_its_descriptor() {
        let guest = Guest::with_history();
        let mut chain = Chain::open_raw(&guest.snapshots[0], PAGE).unwrap();
        for diff in &guest.snapshots[1..] {
            let file = std::fs::File::open(diff).unwrap();
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            chain.push_raw(path).unwrap();
        }
        assert!(whole(&chain) == guest.ram);
    }

    /// Neither a name nor a length shows what a file holds.
    #[test]
    fn sparse_file_of_any_length_takes_no_memory() {
        const HUGE: u64 = 1 << 62;
        let fd =
            nix::sys::memfd::memfd_create(c"huge", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(HUGE).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let chain = Chain::open_raw(&path, 1).unwrap();
        let mut end = [0xee; 10];
        chain.read_at(HUGE - 10, &mut end).unwrap();
        assert_eq!(end, [0; 10]);
        assert_eq!(chain.covered_runs().count(), 0);
        let error = memory_image::MappedChain::open(&chain).unwrap_err();
        assert!(
            matches!(error, MapError::Reserve { size: HUGE, .. }),
            "{error:?}"
        );
        let flat = tempfile::tempdir().unwrap();
        let error = chain.flatten(flat.path().join("flat")).unwrap_err();
        assert!(matches!(error, MergeError::Write(_)), "{error:?}");
    }
}
