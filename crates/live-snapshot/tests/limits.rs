//! A full pool, a rate limit, and what does not fit the guest.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;
#[path = "support/scene.rs"]
mod scene;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use dirty_bitmap::Policy;
use guest::{Guest, PAGE, assert_same};
use live_snapshot::{
    CancelToken, LiveError, LiveSnapshot, LiveSnapshotOptions, Method, UffdTracker, WhenPoolFull,
};
use memory::{Discard, Kind, Memory};
use memory_writer::{Layout, MemoryWriter, Seal, SnapshotError, WriteAmbiguity};
use page_reader::PageReader;
use rstest::rstest;
use scene::{SIZE, Scene, assert_cancelled, options};
use test_machine::needs;

/// The policies of a full pool, with a guest that overwrites all of its RAM after the pause.
#[rstest]
fn guest_that_overwrites_all_ram_waits_for_the_pool(
    #[values(WhenPoolFull::Wait, WhenPoolFull::Throttle)] when_full: WhenPoolFull,
    #[values(Policy::Pages, Policy::Blocks)] policy: Policy,
) {
    needs!(Userfaultfd);
    let guest = Guest::with_policy(Kind::Private, SIZE / 2, policy);
    guest.fill();
    let ram = guest.contents();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    let writer = Scene::options().open(&path, SIZE / 2, PAGE).unwrap();
    let options = LiveSnapshot::options()
        .pool(2 * PAGE)
        .when_pool_full(when_full);
    let live = options.begin(&guest.tracker, writer).unwrap();
    let frozen = live.freeze().unwrap();
    let report = std::thread::scope(|scope| {
        // From the last page on, while the image is written from the first one on.
        let pages = (0..SIZE / 2 / PAGE).rev();
        let vcpu = scope.spawn(|| guest.write_pages(pages, 9));
        let report = frozen.commit().unwrap();
        vcpu.join().unwrap();
        report
    });
    assert_same(&std::fs::read(&path).unwrap(), &ram);
    assert!(report.pool_peak <= 2 * PAGE, "{report:?}");
    assert_eq!(guest.dirty().len() as u64, SIZE / 2 / PAGE);
}

/// The first two pages fill the pool. The third write waits.
#[rstest]
fn vcpu_that_waits_for_the_pool_continues_when_the_snapshot_ends(
    #[values(false, true)] by_token: bool,
) {
    needs!(Userfaultfd);
    let scene = Scene::new();
    let token = CancelToken::new();
    let options = options(Method::CopyOnWrite, &token).pool(2 * PAGE);
    let live = options.begin(&scene.guest.tracker, scene.writer()).unwrap();
    let frozen = live.freeze().unwrap();
    let written = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            for page in 20..30 {
                scene.guest.write_pages([page], 9);
                written.fetch_add(1, Ordering::SeqCst);
            }
        });
        while written.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        assert_eq!(written.load(Ordering::SeqCst), 2);
        match by_token {
            true => {
                token.cancel();
                assert_cancelled(frozen.commit());
            }
            false => drop(frozen),
        }
        vcpu.join().unwrap();
    });
    scene.assert_unharmed(20..30);
}

/// The tracker looks for discarded pages when a write has failed. It must not wait for the fault
/// that waits for the pool.
#[test]
fn failed_write_ends_the_wait_for_the_pool() {
    needs!(Userfaultfd);
    let scene = Scene::new();
    let options = Scene::options().progress(|_| ControlFlow::Break(()));
    let live = LiveSnapshot::options().pool(2 * PAGE);
    let live = live.begin(&scene.guest.tracker, scene.open(&options));
    let frozen = live.unwrap().freeze().unwrap();
    let written = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            for page in 20..30 {
                scene.guest.write_pages([page], 9);
                written.fetch_add(1, Ordering::SeqCst);
            }
        });
        while written.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        scene.guest.memory.discard(Discard::DontNeed, 900);
        assert_cancelled(frozen.commit());
        vcpu.join().unwrap();
    });
    scene.assert_unharmed((20..30).chain([900]));
}

#[test]
fn full_pool_cancels_if_the_guest_must_not_wait() {
    needs!(Userfaultfd);
    let scene = Scene::new();
    let options = LiveSnapshot::options()
        .pool(2 * PAGE + 1)
        .when_pool_full(WhenPoolFull::Cancel);
    let live = options.begin(&scene.guest.tracker, scene.writer()).unwrap();
    let frozen = live.freeze().unwrap();
    scene.guest.write_pages(20..30, 9);
    let result = frozen.commit();
    assert!(matches!(result, Err(LiveError::PoolFull)), "{result:?}");
    scene.assert_unharmed(20..30);
}

#[test]
fn writer_that_does_not_fit_the_guest_is_refused() {
    needs!(Userfaultfd);
    let scene = Scene::new();
    let path = scene.dir.path().join("diff.mem");
    let begin = |options: LiveSnapshotOptions, size, page| {
        let writer = Scene::options().open(&path, size, page).unwrap();
        options.begin(&scene.guest.tracker, writer).unwrap_err()
    };
    let options = LiveSnapshot::options;
    let error = begin(options(), SIZE * 2, PAGE);
    let size =
        matches!(error, LiveError::Size { writer, guest } if (writer, guest) == (SIZE * 2, SIZE));
    assert!(size, "{error:?}");
    let error = begin(options(), SIZE, PAGE * 2);
    assert!(
        matches!(
            error,
            LiveError::PageSize {
                image: 8192,
                tracked: 4096
            }
        ),
        "{error:?}"
    );
    let error = begin(options().pool(2 * PAGE - 1), SIZE, PAGE);
    assert!(
        matches!(
            error,
            LiveError::PoolTooSmall {
                pool: 8191,
                page_size: 4096
            }
        ),
        "{error:?}"
    );
    let texts = [
        "the writer is for 8388608 bytes of RAM, but the guest has 4194304",
        "pages of 8192 bytes, but the guest's writes are tracked in pages of 4096 bytes",
        "a pool of 8191 bytes is too small for pages of 4096 bytes: give it at least 8192 bytes",
    ];
    let errors = [
        begin(options(), SIZE * 2, PAGE),
        begin(options(), SIZE, PAGE * 2),
        begin(options().pool(2 * PAGE - 1), SIZE, PAGE),
    ];
    for (error, text) in errors.iter().zip(texts) {
        assert!(error.to_string().contains(text), "{error}");
    }
    scene.assert_unharmed([]);
}

#[test]
fn ram_that_is_not_mapped_here_is_refused() {
    needs!(Userfaultfd);
    struct NoMemory;
    impl PageReader for NoMemory {
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Ok(())
        }
        fn known_size(&self) -> Option<u64> {
            Some(SIZE)
        }
    }
    let error = UffdTracker::start(&Arc::new(NoMemory)).unwrap_err();
    assert!(
        error.to_string().contains("no host memory at offset 0x0"),
        "{error}"
    );
    let huge = Guest::private(SIZE);
    // Memory is registered with one userfaultfd at a time.
    let error = UffdTracker::start(&huge.memory.ram).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("failed to track writes by userfaultfd"),
        "{error}"
    );
}

#[test]
fn huge_pages_need_their_size() {
    needs!(Userfaultfd, HugePages);
    let memory = Memory::new(Kind::Huge, SIZE);
    let error = UffdTracker::start(&memory.ram).unwrap_err();
    assert!(
        error.to_string().contains("set `page_size` to their size"),
        "{error}"
    );
    memory.ram.write_at(0, &[1]).unwrap();
    let options = UffdTracker::options().page_size(2 << 20);
    options
        .start(&memory.ram)
        .unwrap()
        .set_baseline(live_snapshot::ParentImage::Unknown)
        .unwrap();
    // Writable again.
    memory.ram.write_at(0, &[2]).unwrap();
}

#[test]
fn rate_limit_is_kept() {
    needs!(Userfaultfd);
    for method in [Method::CopyOnWrite, Method::PreCopy] {
        let scene = Scene::new();
        let live = LiveSnapshot::options().method(method).rate_limit(32 << 20);
        let live = live.begin(&scene.guest.tracker, scene.writer()).unwrap();
        let report = live.freeze().unwrap().commit().unwrap();
        let took = report.prepared_in + report.written_in;
        // The first chunk is not delayed.
        let least = Duration::from_secs_f64((SIZE - (1 << 20)) as f64 / (32 << 20) as f64);
        assert!(took >= least, "{took:?}");
        if method == Method::CopyOnWrite {
            assert!(report.written_in >= least, "{report:?}");
            assert!(report.passes.is_empty() && report.convergence.is_none());
        }
    }
}

#[test]
fn waiting_write_continues_when_the_tracker_is_dropped() {
    needs!(Userfaultfd);
    let memory = Arc::new(Memory::new(Kind::Private, SIZE));
    for _ in 0..20 {
        let tracker = UffdTracker::start(&memory.ram).unwrap();
        tracker
            .set_baseline(live_snapshot::ParentImage::Unknown)
            .unwrap();
        let began = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                began.wait();
                (0..64).for_each(|page| memory.ram.write_at(page * PAGE, &[7]).unwrap());
            });
            began.wait();
            drop(tracker);
        });
    }
}

/// Both are known before anything is prepared.
#[test]
fn diff_that_cannot_be_written_is_refused_at_the_start() {
    needs!(Userfaultfd);
    let guest = Guest::with_policy(Kind::Private, SIZE, Policy::Pages);
    guest.fill();
    let options = LiveSnapshot::options().diff(true);
    let nameless = tempfile::tempfile().unwrap();
    let nameless = MemoryWriter::options().open_file(nameless, SIZE, PAGE);
    let error = options
        .begin(&guest.tracker, nameless.unwrap())
        .unwrap_err();
    assert!(
        matches!(
            error,
            LiveError::Write(SnapshotError::AmbiguousDiff {
                source: WriteAmbiguity::NoName,
                ..
            })
        ),
        "{error:?}"
    );
    let dir = tempfile::tempdir().unwrap();
    let seal = Seal::new().on_raw_image();
    let mut written = MemoryWriter::options()
        .layout(Layout::Packed)
        .seal(seal)
        .open(dir.path().join("diff.mem"), SIZE, PAGE)
        .unwrap();
    written.write_zeros(|| std::iter::once(0..PAGE)).unwrap();
    let error = options.begin(&guest.tracker, written).unwrap_err();
    assert!(
        matches!(error, LiveError::Write(SnapshotError::WrittenBefore { .. })),
        "{error:?}"
    );
    assert_eq!(guest.dirty().len() as u64, SIZE / PAGE);
}
