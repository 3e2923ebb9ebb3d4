//! Discards by the host are in the image or refused: it never has wrong bytes.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dirty_bitmap::Policy;
use guest::{Guest, Images, PAGE, assert_same};
use live_snapshot::{
    LiveError, LiveSnapshot, LiveSnapshotOptions, LiveTracker, Method, ParentImage, Report,
};
use memory::{Discard, Kind};
use memory_writer::{Layout, MemoryWriter};
use rstest::rstest;
use test_machine::needs;

/// Two blocks, which a fault may unprotect as a whole.
const SIZE: u64 = 4 << 20;

/// A page that is written before a snapshot, and one that is not.
const PAGES: [u64; 2] = [3, 5];

/// Creates a guest whose RAM is written, except for page 5.
fn guest(kind: Kind, policy: Policy) -> Guest {
    let guest = Guest::with_policy(kind, SIZE, policy);
    guest.write_pages((0..SIZE / PAGE).filter(|page| *page != PAGES[1]), 1);
    guest
}

fn take(guest: &Guest, images: &mut Images, diff: bool) -> Result<Report, LiveError> {
    let newest = images.newest();
    let options = LiveSnapshot::options().diff(diff);
    let live = options.begin(&guest.tracker, images.next(diff));
    let taken = live.and_then(|live| live.freeze()?.commit());
    if taken.is_err() {
        images.forget(newest);
    }
    taken
}

/// Checks that a snapshot was refused because page `page` was discarded, and that the next diff has
/// all changes.
#[track_caller]
fn assert_refused(
    result: Result<Report, LiveError>,
    page: u64,
    guest: &Guest,
    images: &mut Images,
) {
    let Err(LiveError::Discarded { offset }) = result else {
        panic!("{result:?}");
    };
    assert!((offset / PAGE).abs_diff(page) < 16, "{offset:#x}");
    take(guest, images, true).unwrap();
    assert_same(&images.contents(), &guest.contents());
}

#[rstest]
fn discard_of_a_page_that_is_not_copied_is_refused(
    #[values(Policy::Pages, Policy::Blocks)] policy: Policy,
    #[values(false, true)] neighbor_is_written: bool,
    #[values(false, true)] diff: bool,
) {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, policy);
    let mut images = Images::new(Layout::Sealed, SIZE);
    take(&guest, &mut images, false).unwrap();
    guest.write_pages([3, 4], 2);
    let newest = images.newest();
    let options = LiveSnapshot::options().diff(diff);
    let live = match diff {
        true => options.begin(&guest.tracker, images.next(true)).unwrap(),
        false => {
            // Keeps the chain of diffs, on which the next one is based.
            let path = images.dir().join("other.mem");
            let writer = MemoryWriter::open(&path, SIZE, PAGE).unwrap();
            options.begin(&guest.tracker, writer).unwrap()
        }
    };
    let frozen = live.freeze().unwrap();
    guest.memory.discard(Discard::DontNeed, 3);
    if neighbor_is_written {
        // By blocks, the fault copies page 3 too.
        guest.write_pages([4], 3);
    }
    let result = frozen.commit();
    if diff {
        images.forget(newest);
    }
    assert_refused(result, 3, &guest, &mut images);
}

/// The mark is for the next diff. The bytes of the point in time are lost.
#[test]
fn marked_discard_after_the_pause_is_refused() {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, Policy::Pages);
    let mut images = Images::new(Layout::Sealed, SIZE);
    take(&guest, &mut images, false).unwrap();
    guest.write_pages([3], 2);
    let newest = images.newest();
    let options = LiveSnapshot::options().diff(true);
    let live = options.begin(&guest.tracker, images.next(true)).unwrap();
    let frozen = live.freeze().unwrap();
    guest.memory.discard(Discard::DontNeed, 3);
    guest.tracker.mark_range(3 * PAGE, PAGE).unwrap();
    let result = frozen.commit();
    images.forget(newest);
    assert_refused(result, 3, &guest, &mut images);
}

/// Between `begin` and `freeze`, a page loses its protection without a mark. It may be written
/// then, and a later fault of its block would hide it.
#[rstest]
fn discard_while_the_guest_is_prepared_is_refused(
    #[values(0, 1)] page: usize,
    #[values(false, true)] is_written: bool,
    #[values(Policy::Pages, Policy::Blocks)] policy: Policy,
    #[values(Method::CopyOnWrite, Method::PreCopy)] method: Method,
    #[values(false, true)] neighbor_is_written: bool,
) {
    needs!(Userfaultfd);
    let page = PAGES[page];
    let guest = guest(Kind::Private, policy);
    let mut images = Images::new(Layout::Sealed, SIZE);
    take(&guest, &mut images, false).unwrap();
    let newest = images.newest();
    let options = LiveSnapshot::options().method(method).diff(true);
    let live = options.begin(&guest.tracker, images.next(true)).unwrap();
    guest.memory.discard(Discard::DontNeed, page);
    if is_written {
        guest.write_pages([page], 2);
    }
    let frozen = live.freeze().unwrap();
    if neighbor_is_written {
        guest.write_pages([page + 1], 3);
    }
    let result = frozen.commit();
    images.forget(newest);
    assert_refused(result, page, &guest, &mut images);
}

#[rstest]
fn full_image_refuses_unseen_writes_of_untouched_pages(
    #[values(Method::CopyOnWrite, Method::PreCopy)] method: Method,
) {
    needs!(Userfaultfd);
    let guest = Guest::private(SIZE);
    guest.write_pages([1], 1);
    let mut images = Images::new(Layout::Sealed, SIZE);
    let options = LiveSnapshot::options().method(method);
    let live = options.begin(&guest.tracker, images.next(false)).unwrap();
    guest.memory.discard(Discard::DontNeed, 700);
    guest.write_pages([700], 2);
    let result = live.freeze().and_then(|frozen| frozen.commit());
    let Err(LiveError::Discarded { offset }) = result else {
        panic!("{result:?}");
    };
    assert!((offset / PAGE).abs_diff(700) < 16, "{offset:#x}");
    images.forget(None);
    take(&guest, &mut images, false).unwrap();
    assert_same(&images.contents(), &guest.contents());
}

#[rstest]
fn marked_discard_before_the_pause_is_in_the_image(
    #[values(false, true)] is_written: bool,
    #[values(Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy)] method: Method,
) {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, Policy::Pages);
    let mut images = Images::new(Layout::Sealed, SIZE);
    let options = LiveSnapshot::options().method(method);
    let live = options.begin(&guest.tracker, images.next(false)).unwrap();
    for page in PAGES {
        guest.memory.discard(Discard::DontNeed, page);
        guest.tracker.mark_range(page * PAGE, PAGE).unwrap();
        if is_written {
            guest.write_pages([page], 2);
        }
    }
    let ram = guest.contents();
    let frozen = live.freeze().unwrap();
    guest.write_pages(PAGES, 3);
    frozen.commit().unwrap();
    assert_same(&images.contents(), &ram);
    assert!(PAGES.iter().all(|page| guest.dirty().contains(page)));
}

/// Private memory shows discards by its page table. Shared memory does not.
#[rstest]
#[case::marked(Kind::Private, Discard::DontNeed, true)]
#[case::not_marked(Kind::Private, Discard::DontNeed, false)]
#[case::removed(Kind::Memfd, Discard::Remove, true)]
#[case::punched(Kind::Memfd, Discard::Punch, true)]
fn discard_between_snapshots_is_in_the_next_diff(
    #[case] kind: Kind,
    #[case] how: Discard,
    #[case] is_marked: bool,
    #[values(false, true)] is_written: bool,
) {
    needs!(Userfaultfd);
    let guest = guest(kind, Policy::Pages);
    let mut images = Images::new(Layout::Packed, SIZE);
    take(&guest, &mut images, false).unwrap();
    guest.memory.discard(how, 3);
    if is_marked {
        guest.tracker.mark_range(3 * PAGE, PAGE).unwrap();
    }
    if is_written {
        guest.write_pages([3], 2);
    }
    take(&guest, &mut images, true).unwrap();
    assert_same(&images.contents(), &guest.contents());
    // The page is protected again.
    guest.write_pages([3], 4);
    assert_eq!(guest.dirty(), [3].into());
    take(&guest, &mut images, true).unwrap();
    assert_same(&images.contents(), &guest.contents());
}

#[rstest]
#[case::private(Kind::Private, Discard::DontNeed)]
#[case::removed(Kind::Memfd, Discard::Remove)]
#[case::punched(Kind::Memfd, Discard::Punch)]
fn discard_through_the_tracker_never_harms_a_snapshot(
    #[case] kind: Kind,
    #[case] how: Discard,
    #[values(Policy::Pages, Policy::Blocks)] policy: Policy,
    #[values(Method::CopyOnWrite, Method::PreCopy)] method: Method,
) {
    needs!(Userfaultfd);
    let guest = guest(kind, policy);
    let discard = |page: u64| {
        let discarded = guest
            .tracker
            .discard(page * PAGE, PAGE, || guest.memory.discard(how, page));
        discarded.unwrap();
    };
    let mut images = Images::new(Layout::Sealed, SIZE);
    let options = || LiveSnapshot::options().method(method);
    let take = |images: &mut Images, options: LiveSnapshotOptions, diff| {
        discard(10);
        let live = options
            .diff(diff)
            .begin(&guest.tracker, images.next(diff))
            .unwrap();
        [11, 12, 5].into_iter().for_each(discard);
        guest.write_pages([12], 2);
        let ram = guest.contents();
        let frozen = live.freeze().unwrap();
        [12, 13, 14, 5].into_iter().for_each(discard);
        guest.write_pages([14, 15], 3);
        frozen.commit().unwrap();
        assert_same(&images.contents(), &ram);
    };
    take(&mut images, options(), false);
    let dirty = guest.dirty();
    assert!([12, 13, 14, 5, 15].iter().all(|page| dirty.contains(page)));
    take(&mut images, options(), true);
    assert!(
        guest
            .tracker
            .discard(SIZE, PAGE, || unreachable!())
            .is_err()
    );
}

#[test]
fn first_discarded_page_is_found_behind_written_ones() {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, Policy::Pages);
    guest.tracker.set_baseline(ParentImage::Unknown).unwrap();
    guest.write_pages([10, 11, 13, 600], 2);
    assert_eq!(guest.tracker.mark_discarded().unwrap(), None);
    for page in [12, 700] {
        guest.memory.discard(Discard::DontNeed, page);
    }
    let all = guest.tracker.find_discarded(0..SIZE).unwrap();
    assert_eq!(all, Some(12 * PAGE));
    let later = guest.tracker.find_discarded(13 * PAGE..SIZE).unwrap();
    assert_eq!(later, Some(700 * PAGE));
    assert_eq!(guest.tracker.mark_discarded().unwrap(), Some(12 * PAGE));
    assert_eq!(guest.dirty(), [10, 11, 12, 13, 600, 700].into());
    assert_eq!(guest.tracker.mark_discarded().unwrap(), None);
}

#[test]
fn unseen_discards_of_all_pages_are_in_the_next_diff() {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, Policy::default());
    let mut images = Images::new(Layout::Sealed, SIZE);
    take(&guest, &mut images, false).unwrap();
    (0..SIZE / PAGE).for_each(|page| guest.memory.discard(Discard::DontNeed, page));
    assert!(guest.tracker.bitmap().is_clean());
    take(&guest, &mut images, true).unwrap();
    assert_same(&images.contents(), &vec![0; SIZE as usize]);
}

/// The pages around a discarded one are protected again, and the discarded one must not be.
#[rstest]
fn discard_between_written_pages_is_refused_or_right(
    #[values(Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy)] method: Method,
    #[values(false, true)] is_written: bool,
) {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, Policy::Pages);
    let mut images = Images::new(Layout::Sealed, SIZE);
    take(&guest, &mut images, false).unwrap();
    let newest = images.newest();
    let options = LiveSnapshot::options().method(method).diff(true);
    let live = options.begin(&guest.tracker, images.next(true)).unwrap();
    guest.memory.discard(Discard::DontNeed, 100);
    if is_written {
        guest.write_pages([100], 2);
    }
    guest.write_pages([99, 101], 2);
    let result = live.freeze().and_then(|frozen| frozen.commit());
    images.forget(newest);
    assert_refused(result, 100, &guest, &mut images);
}

/// A mark hides that the protection of a page is missing.
#[rstest]
fn mark_after_the_pause_does_not_hide_a_discard_before_it(#[values(false, true)] discards: bool) {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, Policy::Pages);
    let mut images = Images::new(Layout::Sealed, SIZE);
    take(&guest, &mut images, false).unwrap();
    guest.write_pages([3], 2);
    let newest = images.newest();
    let options = LiveSnapshot::options().diff(true);
    let live = options.begin(&guest.tracker, images.next(true)).unwrap();
    guest.memory.discard(Discard::DontNeed, 700);
    guest.write_pages([700], 2);
    let frozen = live.freeze().unwrap();
    match discards {
        true => guest.tracker.discard(700 * PAGE, PAGE, || ()).unwrap(),
        false => guest.tracker.mark_range(700 * PAGE, PAGE).unwrap(),
    }
    let result = frozen.commit();
    images.forget(newest);
    assert_refused(result, 700, &guest, &mut images);
}

/// All of the RAM is written in the pause, in which a balloon may go on.
#[test]
fn discard_waits_for_the_pause_of_stop_and_copy() {
    needs!(Userfaultfd);
    let guest = guest(Kind::Private, Policy::Pages);
    let ram = guest.contents();
    let last = SIZE / PAGE - 1;
    let [started, returned] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let seen = (Arc::clone(&started), Arc::clone(&returned));
    // Before the last page is written, the discard gets time to be made.
    let options = MemoryWriter::options().progress(move |_| {
        seen.0.store(true, Ordering::SeqCst);
        for _ in 0..1000 {
            if !seen.1.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        ControlFlow::Continue(())
    });
    let mut images = Images::new(Layout::Sealed, SIZE);
    let writer = images.next_by(false, options.chunk_size(64 << 10));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !started.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let discard = || guest.memory.discard(Discard::DontNeed, last);
            guest.tracker.discard(last * PAGE, PAGE, discard).unwrap();
            returned.store(true, Ordering::SeqCst);
        });
        let live = LiveSnapshot::options().method(Method::StopAndCopy);
        let live = live.begin(&guest.tracker, writer).unwrap();
        live.freeze().unwrap().commit().unwrap();
    });
    assert_same(&images.contents(), &ram);
    assert!(guest.dirty().contains(&last));
}
