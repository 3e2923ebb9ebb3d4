//! The image is the RAM at the point in time, regardless of writes before and after.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;

use dirty_bitmap::Policy;
use guest::{Guest, Images, PAGE, assert_same};
use live_snapshot::{LiveError, LiveSnapshot, LiveTracker, Method};
use memory::Kind;
use memory_image::Image;
use memory_writer::{Durability, Layout, MemoryWriter, Seal, SnapshotError};
use rstest::rstest;
use test_machine::needs;

/// Four blocks, which a fault may unprotect as a whole.
const SIZE: u64 = 8 << 20;

#[rstest]
#[case::raw(Layout::Raw)]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn image_is_the_ram_at_the_point_in_time(
    #[case] layout: Layout,
    #[values(Kind::Private, Kind::Memfd, Kind::Huge, Kind::Gap)] kind: Kind,
) {
    needs!(Userfaultfd);
    if kind == Kind::Huge {
        needs!(HugePages);
    }
    let mut guest = Guest::with_policy(kind, SIZE, Policy::default());
    guest.fill();
    let mut images = Images::new(layout, SIZE);
    guest.run_vcpu(1, SIZE / 2);
    guest.run_vcpu(2, SIZE / 4);
    guest.run_device(3);
    let methods = [Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy];
    for (round, method) in methods.into_iter().enumerate() {
        let diff = round > 0;
        let options = LiveSnapshot::options()
            .method(method)
            .diff(diff)
            .max_passes(2)
            .remainder(1 << 20);
        let live = options.begin(&guest.tracker, images.next(diff)).unwrap();
        let (frozen, ram) = guest.pause(|| {
            let ram = guest.contents();
            (live.freeze().unwrap(), ram)
        });
        guest.wait_for_writes(64);
        let report = frozen.commit().unwrap();
        assert_eq!(report.method, method);
        assert_same(&images.contents(), &ram);
    }
}

/// Of each kind of memory, also pages that a fault unprotects with others.
#[rstest]
fn pages_overwritten_after_the_pause_have_their_old_bytes(
    #[values(Kind::Private, Kind::Memfd, Kind::Huge, Kind::Gap)] kind: Kind,
    #[values(Policy::Pages, Policy::Blocks)] policy: Policy,
    #[values(Method::CopyOnWrite, Method::PreCopy)] method: Method,
) {
    needs!(Userfaultfd);
    if kind == Kind::Huge {
        needs!(HugePages);
    }
    let guest = Guest::with_policy(kind, SIZE, policy);
    guest.fill();
    let mut images = Images::new(Layout::Sealed, SIZE);
    let options = LiveSnapshot::options().method(method).remainder(0);
    let live = options
        .max_passes(1)
        .begin(&guest.tracker, images.next(false))
        .unwrap();
    guest.write_pages([0, 7, 700, 1200, 2047], 1);
    let ram = guest.contents();
    let frozen = live.freeze().unwrap();
    let last = SIZE / PAGE - 1;
    for seed in 2..4 {
        guest.write_pages([0, 1, 7, 8, 600, 1023, 1024, last], seed);
    }
    let report = frozen.commit().unwrap();
    assert_same(&images.contents(), &ram);
    if (method, policy) == (Method::CopyOnWrite, Policy::Pages) {
        let written = match kind {
            Kind::Huge => 4,
            Kind::Private | Kind::Memfd | Kind::Gap => 8,
        };
        assert_eq!(report.copied_before_write, written * kind.page_size());
        assert_eq!(report.pool_peak, report.copied_before_write);
        assert_eq!(report.pool_waits, 0);
    }
    // The writes since are in the next diff.
    let ram = guest.contents();
    let live = LiveSnapshot::options().diff(true);
    let live = live.begin(&guest.tracker, images.next(true)).unwrap();
    live.freeze().unwrap().commit().unwrap();
    assert_same(&images.contents(), &ram);
}

#[rstest]
fn untouched_pages_are_zeros_and_stay_unallocated(
    #[values(Kind::Private, Kind::Memfd)] kind: Kind,
    #[values(Method::CopyOnWrite, Method::StopAndCopy)] method: Method,
) {
    needs!(Userfaultfd);
    let guest = Guest::with_policy(kind, SIZE, Policy::Pages);
    guest.write_pages([1, 600], 5);
    let mut expected = vec![0; SIZE as usize];
    for page in [1_u64, 600, 601] {
        let at = (page * PAGE + page % 500 * 8) as usize;
        expected[at..at + 8].copy_from_slice(&(page << 32 ^ 5).to_ne_bytes());
    }
    let mut images = Images::new(Layout::Packed, SIZE);
    for _ in 0..2 {
        let options = LiveSnapshot::options().method(method);
        let live = options.begin(&guest.tracker, images.next(false)).unwrap();
        guest.write_pages([601], 5);
        let frozen = live.freeze().unwrap();
        frozen.commit().unwrap();
        let allocated = guest.memory.allocated();
        assert!(allocated <= 16 * PAGE, "{allocated}");
        if method == Method::CopyOnWrite {
            // Blocks of 32 KiB around two groups of pages, the header and the footer.
            let stored = images.newest_len();
            assert!(stored < 128 << 10, "{stored}");
        }
        assert_same(&images.contents(), &expected);
    }
    let live = LiveSnapshot::options()
        .begin(&guest.tracker, images.next(false))
        .unwrap();
    let frozen = live.freeze().unwrap();
    guest.write_pages([3, 1500], 6);
    frozen.commit().unwrap();
    assert_same(&images.contents(), &expected);
    assert_eq!(guest.dirty(), [3, 1500].into());
    let live = LiveSnapshot::options().diff(true);
    let live = live.begin(&guest.tracker, images.next(true)).unwrap();
    live.freeze().unwrap().commit().unwrap();
    assert_same(&images.contents(), &guest.contents());
}

#[rstest]
#[case(Layout::Raw)]
#[case(Layout::Sealed)]
#[case(Layout::Packed)]
fn live_and_ordinary_images_make_one_chain(#[case] layout: Layout) {
    needs!(Userfaultfd);
    let guest = Guest::private(SIZE);
    guest.fill();
    let mut images = Images::new(layout, SIZE);
    for round in 0..5 {
        let (diff, method) = (round > 0, Method::ALL[round % 4]);
        let parent = images.newest();
        let writer = images.next(diff);
        if diff && round % 2 == 0 {
            // Not by a live snapshot.
            let epoch = guest.tracker.begin_epoch().unwrap();
            let mut writer = writer;
            writer
                .write_diff(&*guest.memory.ram, epoch.bitmap())
                .unwrap();
            writer.commit_and_release(epoch).unwrap();
        } else {
            let options = LiveSnapshot::options().diff(diff).method(method);
            let live = options.begin(&guest.tracker, writer).unwrap();
            let mut frozen = live.freeze().unwrap();
            if layout != Layout::Raw {
                frozen.set_metadata(vec![round as u8; 100]).unwrap();
            }
            frozen.commit().unwrap();
        }
        assert_same(&images.contents(), &guest.contents());
        let bitmap = guest.tracker.bitmap();
        assert_eq!(bitmap.parent_id(), images.newest().map(|id| id.to_bytes()));
        assert!(bitmap.is_clean());
        if layout != Layout::Raw {
            assert_ne!(parent, images.newest());
        }
        // The fourth diff has no page.
        if round != 3 {
            guest.write_pages([round as u64, 100, 2000 - round as u64], round as u64);
        }
    }
    if layout != Layout::Raw {
        let third = Image::open(images.dir().join("3.mem")).unwrap();
        assert_eq!(third.footer().unwrap().metadata, [3; 100]);
    }
}

#[test]
fn diff_on_a_stale_parent_is_refused() {
    needs!(Userfaultfd);
    let guest = Guest::private(SIZE);
    let mut images = Images::new(Layout::Sealed, SIZE);
    let take = |writer, diff| {
        let options = LiveSnapshot::options().diff(diff);
        let live = options.begin(&guest.tracker, writer)?;
        live.freeze()?.commit()
    };
    take(images.next(false), false).unwrap();
    let stale = images.newest().unwrap();
    guest.write_pages([1], 1);
    take(images.next(true), true).unwrap();
    guest.write_pages([2], 1);
    let options = MemoryWriter::options()
        .durability(Durability::None)
        .layout(Layout::Sealed)
        .seal(Seal::new().parent(stale));
    let path = images.dir().join("stale.mem");
    let refused = take(options.open(&path, SIZE, PAGE).unwrap(), true);
    let stale = matches!(
        &refused,
        Err(LiveError::Write(SnapshotError::StaleParent { .. }))
    );
    assert!(stale, "{refused:?}");
    assert!(!path.exists());
    assert_eq!(guest.dirty(), [2].into());
    take(images.next(true), true).unwrap();
    assert_same(&images.contents(), &guest.contents());
}
