//! Lists extents of files that are dense, sparse, reserved, or changed during the listing.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rstest::rstest;
use sparse_file::{
    Extent, ExtentKind, ExtentSource, Extents, allocated_bytes, extents, extents_in, grow,
    punch_hole, reported_extents, reserve,
};
use support::{Fs, child_task, contents, expect_success, strace_child};

const PAGE: u64 = 4096;
/// Every second page of a file of 201 is data, and the last one is a hole.
const PAGES: u64 = 201;

fn striped(fs: Fs, test: &str) -> Option<(support::Place, File)> {
    let place = fs.mount(test)?;
    let file = place.file();
    grow(&file, PAGES * PAGE).expect("grown");
    for page in (1..PAGES).step_by(2) {
        file.write_all_at(&[7; PAGE as usize], page * PAGE)
            .expect("written");
    }
    Some((place, file))
}

/// Fails unless the extents cover `[0, len)` and adjacent ones differ in kind.
fn covering(listed: impl Iterator<Item = std::io::Result<Extent>>, len: u64) -> Vec<Extent> {
    let listed: Vec<_> = listed.map(|extent| extent.expect("listed")).collect();
    let mut at = 0;
    let mut kind = None;
    for extent in &listed {
        assert_eq!(extent.range.start, at, "{listed:?}");
        assert!(extent.range.end > at, "{listed:?}");
        assert_ne!(Some(extent.kind), kind, "{listed:?}");
        (at, kind) = (extent.range.end, Some(extent.kind));
    }
    assert_eq!(at, len, "{listed:?}");
    listed
}

fn one(range: Range<u64>, kind: ExtentKind) -> Vec<Extent> {
    vec![Extent { range, kind }]
}

/// Programs that made one SEEK_DATA call per page were slow: the call took 25 ms on btrfs.
#[rstest]
fn seek_data_is_called_once_per_extent(#[values(Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs)] fs: Fs) {
    let Some((_place, file)) = striped(fs, "seek_data_is_called_once_per_extent") else {
        return;
    };
    let mut enough = extents(&file).expect("listed").limit_calls(PAGES);
    assert_eq!(covering(enough.by_ref(), PAGES * PAGE).len() as u64, PAGES);
    assert!(enough.are_exact());
}

#[test]
fn listing_at_its_call_limit_reports_the_rest_as_data() {
    let Some((_place, file)) = striped(Fs::Tmpfs, "a_listing_that_may_make_no_more_calls") else {
        return;
    };
    let mut few: Extents<&File> = extents(&file).expect("listed").limit_calls(11);
    let listed = covering(few.by_ref(), PAGES * PAGE);
    assert_eq!(few.source(), ExtentSource::CutShort);
    assert!(!few.are_exact());
    assert_eq!(listed.len(), 12);
    assert_eq!(
        listed[11],
        Extent {
            range: 11 * PAGE..PAGES * PAGE,
            kind: ExtentKind::Data
        }
    );
}

/// A page map made of allocated ranges would count reserved but unwritten ones as data.
#[rstest]
fn posix_fallocated_ranges_are_holes_until_written(
    #[values(Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs)] fs: Fs,
) {
    let Some(place) = fs.mount("posix_fallocated_ranges_are_holes_until_written") else {
        return;
    };
    let file = place.file();
    let len = 256 * PAGE;
    reserve(&file, len).expect("reserved");
    assert_eq!(file.metadata().expect("metadata").len(), len);
    assert!(allocated_bytes(&file).expect("allocated") >= len);
    assert_eq!(
        covering(extents(&file).expect("listed"), len),
        one(0..len, ExtentKind::Hole)
    );
    file.write_all_at(&[7; PAGE as usize], 9 * PAGE)
        .expect("written");
    let listed = covering(extents(&file).expect("listed"), len);
    assert_eq!(
        listed[1],
        Extent {
            range: 9 * PAGE..10 * PAGE,
            kind: ExtentKind::Data
        }
    );
}

#[test]
fn file_system_without_holes_yields_one_data_extent() {
    let Some((_place, file)) = striped(
        Fs::Exfat,
        "file_system_without_holes_yields_one_data_extent",
    ) else {
        return;
    };
    let mut listed = extents(&file).expect("listed");
    assert_eq!(listed.source(), ExtentSource::NotUsed);
    assert!(!listed.are_exact());
    assert_eq!(
        covering(listed.by_ref(), PAGES * PAGE),
        one(0..PAGES * PAGE, ExtentKind::Data)
    );
    let reported = reported_extents(&file).expect("listed");
    assert_eq!(reported.source(), ExtentSource::NoHoleReported);
    assert_eq!(
        covering(reported, PAGES * PAGE),
        one(0..PAGES * PAGE, ExtentKind::Data)
    );
    assert_eq!(contents(&file)[PAGE as usize], 7);
}

/// EINVAL and EOPNOTSUPP are injected where the kernel would return them.
#[rstest]
#[case::einval("EINVAL")]
#[case::eopnotsupp("EOPNOTSUPP")]
fn kernel_without_seek_hole_yields_one_data_extent(#[case] errno: &str) {
    const TEST: &str = "kernel_without_seek_hole_yields_one_data_extent";
    let file = tempfile::tempfile().expect("file");
    if child_task().is_some() {
        grow(&file, PAGE).expect("grown");
        let mut listed = extents(&file).expect("listed");
        assert_eq!(listed.source(), ExtentSource::Unsupported);
        return assert_eq!(
            covering(listed.by_ref(), PAGE),
            one(0..PAGE, ExtentKind::Data)
        );
    }
    if test_machine::Need::Strace.met(TEST) {
        let number = if errno == "EINVAL" { 1 } else { 2 };
        let case = format!("{TEST}::case_{number}_{}", errno.to_lowercase());
        // The second lseek is the first that asks for a hole; the harness makes none.
        let inject = format!("error={errno}:when=2");
        let strace = strace_child("lseek", &inject, None, &case, "list");
        expect_success(strace);
    }
}

/// Simulates a driver that always returns offset 0.
#[test]
fn listing_ends_if_seek_makes_no_progress() {
    const TEST: &str = "listing_ends_if_seek_makes_no_progress";
    if child_task().is_some() {
        let file = tempfile::tempfile().expect("file");
        grow(&file, PAGE).expect("grown");
        let mut listed = extents(&file).expect("listed");
        assert_eq!(
            covering(listed.by_ref(), PAGE),
            one(0..PAGE, ExtentKind::Data)
        );
        return assert_eq!(listed.source(), ExtentSource::CutShort);
    }
    if test_machine::Need::Strace.met(TEST) {
        expect_success(strace_child("lseek", "retval=0", None, TEST, "list"));
    }
}

#[test]
fn dense_file_is_one_data_extent() {
    let file = tempfile::tempfile().expect("file");
    file.write_all_at(&[7; 10_000], 0).expect("written");
    assert_eq!(
        covering(extents(&file).expect("listed"), 10_000),
        one(0..10_000, ExtentKind::Data)
    );
}

#[test]
fn empty_file_has_no_extents() {
    let file = tempfile::tempfile().expect("file");
    assert_eq!(covering(extents(&file).expect("listed"), 0), []);
}

#[test]
fn pipe_is_an_error() {
    let (pipe, _writer) = std::io::pipe().expect("pipe");
    let file = File::from(std::os::fd::OwnedFd::from(pipe));
    let error = extents(&file).expect_err("no file");
    assert_eq!(error.raw_os_error(), Some(libc::ESPIPE));
}

#[test]
fn data_that_a_shrinking_file_loses_is_data() {
    const TEST: &str = "data_that_a_shrinking_file_loses_is_data";
    let Some((_place, file)) = striped(Fs::Tmpfs, TEST) else {
        return;
    };
    let mut listing = extents(&file).expect("listed");
    let first: Vec<_> = listing.by_ref().take(20).collect();
    file.set_len(30 * PAGE).expect("shrunk");
    let listed = covering(first.into_iter().chain(listing.by_ref()), PAGES * PAGE);
    let last = listed.last().expect("some");
    assert_eq!(
        last.kind,
        ExtentKind::Data,
        "reading it fails, and is not zeros"
    );
    assert!(last.range.start <= 30 * PAGE, "{last:?}");
    assert_eq!(listing.source(), ExtentSource::CutShort);
}

#[test]
fn hole_that_a_shrinking_file_loses_is_data() {
    let file = tempfile::tempfile().expect("file");
    grow(&file, 100 * PAGE).expect("grown");
    file.write_all_at(&[7; PAGE as usize], 0).expect("written");
    let listing = extents(&file).expect("listed");
    file.set_len(50 * PAGE).expect("shrunk");
    let kinds: Vec<_> = covering(listing, 100 * PAGE)
        .into_iter()
        .map(|extent| (extent.range, extent.kind))
        .collect();
    assert_eq!(
        kinds,
        [
            (0..PAGE, ExtentKind::Data),
            (PAGE..50 * PAGE, ExtentKind::Hole),
            (50 * PAGE..100 * PAGE, ExtentKind::Data),
        ]
    );
}

/// A read past the end returns nothing, which reports the error.
#[test]
fn range_past_the_end_of_the_file_is_data() {
    let file = tempfile::tempfile().expect("file");
    grow(&file, 100 * PAGE).expect("grown");
    let listed: Vec<_> = extents_in(&file, 10 * PAGE..300 * PAGE)
        .expect("listed")
        .map(|extent| extent.expect("listed"))
        .map(|extent| (extent.range, extent.kind))
        .collect();
    assert_eq!(
        listed,
        [
            (10 * PAGE..100 * PAGE, ExtentKind::Hole),
            (100 * PAGE..300 * PAGE, ExtentKind::Data),
        ]
    );
}

/// APFS returns this for clones although data follows.
#[rstest]
#[case::at_the_start(2, 0)]
#[case::in_the_middle(6, 5)]
fn enxio_from_seek_hole_is_not_a_hole(#[case] call: u32, #[case] page: u64) {
    const TEST: &str = "enxio_from_seek_hole_is_not_a_hole";
    if child_task().is_some() {
        let (_place, file) = striped(Fs::Tmpfs, TEST).expect("mounted for the parent");
        // Data at the start of the file.
        file.write_all_at(&[7; PAGE as usize], 0).expect("written");
        let mut listing = extents(&file).expect("listed");
        let listed = covering(listing.by_ref(), PAGES * PAGE);
        assert_eq!(listing.source(), ExtentSource::CutShort);
        let last = listed.last().expect("some");
        let expected = Extent {
            range: page * PAGE..PAGES * PAGE,
            kind: ExtentKind::Data,
        };
        return assert_eq!(*last, expected);
    }
    if test_machine::Need::Strace.met(TEST) && test_machine::Need::Root.met(TEST) {
        let case = match call {
            2 => "case_1_at_the_start",
            _ => "case_2_in_the_middle",
        };
        // The first call queries the position.
        let inject = format!("error=ENXIO:when={call}");
        let case = format!("{TEST}::{case}");
        expect_success(strace_child("lseek", &inject, None, &case, "list"));
    }
}

/// `SEEK_DATA` proves that no data follows only if `SEEK_HOLE` has just returned a hole there.
#[test]
fn enxio_from_seek_data_after_an_invalid_answer_is_not_a_hole() {
    const TEST: &str = "enxio_from_seek_data_after_an_invalid_answer_is_not_a_hole";
    if child_task().is_some() {
        let file = tempfile::tempfile().expect("file");
        file.write_all_at(&[7; 8192], 0).expect("written");
        let listing = extents_in(&file, 4096..8192).expect("listed");
        return assert_eq!(
            listing
                .map(|extent| extent.expect("listed"))
                .collect::<Vec<_>>(),
            one(4096..8192, ExtentKind::Data)
        );
    }
    if test_machine::Need::Strace.met(TEST) {
        // SEEK_HOLE of 4096 returns 0, an offset before the queried one.
        expect_success(strace_child("lseek", "retval=0:when=2", None, TEST, "list"));
    }
}

#[test]
fn growing_file_is_listed_up_to_its_old_length() {
    let Some((_place, file)) = striped(Fs::Tmpfs, "growing_file_is_listed_up_to_its_old_length")
    else {
        return;
    };
    let mut listing = extents(&file).expect("listed");
    let first: Vec<_> = listing.by_ref().take(20).collect();
    // After a gap: the last hole of the old file continues.
    file.write_all_at(&[7; PAGE as usize], (PAGES + 99) * PAGE)
        .expect("grown");
    covering(first.into_iter().chain(listing), PAGES * PAGE);
}

#[test]
fn constantly_changing_file_is_covered_and_the_listing_ends() {
    let Some((_place, file)) = striped(Fs::Tmpfs, "a_file_that_changes_all_the_while") else {
        return;
    };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for page in 0..PAGES {
                    file.write_all_at(&[7; PAGE as usize], page * PAGE)
                        .expect("written");
                    punch_hole(&file, page * PAGE..page * PAGE + PAGE).expect("punched");
                }
            }
        });
        let listed = (0..300).try_for_each(|_| {
            std::panic::catch_unwind(|| covering(extents(&file).expect("listed"), PAGES * PAGE))
                .map(drop)
        });
        stop.store(true, Ordering::Relaxed);
        listed.expect("covered");
    });
}

#[test]
fn file_position_is_restored() {
    let mut file = tempfile::tempfile().expect("file");
    grow(&file, 100 * PAGE).expect("grown");
    file.seek(SeekFrom::Start(5)).expect("seek");
    assert!(extents(&file).expect("listed").next().is_some());
    assert_eq!(file.stream_position().expect("position"), 5);
}
