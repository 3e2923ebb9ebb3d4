//! RAM that is filled on demand: by threads and by system calls, during prefetching.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use lazy_restore::{LazyError, LazyRam, LazyRamOptions, UserfaultfdError};
use memory_image::ReadImageError;
use page_reader::PageReader;
use proptest::prelude::*;
use random::Random;
use rstest::rstest;
use support::lazy_images::on_demand;
use support::open_chain;
use support::regions::{Regions, assert_unreadable, flags, page_at};
use test_images::{Images, whole};
use test_machine::{needs, rounds};

const PAGE: u64 = 4096;

const MIB: u64 = 1 << 20;

/// A base with holes, and two diffs: 16 MiB.
fn full_and_two_diffs() -> Images {
    Images::new(16 * MIB, PAGE)
        .with([0..1000, 1500..3000, 3500..4096])
        .with((0..400).map(|i| 10 * i..10 * i + 1))
        .with([900..1100, 2000..2003, 3200..3300])
}

fn page(ram: &LazyRam, offset: u64) -> io::Result<Vec<u8>> {
    page_at(ram.as_ptr().wrapping_add(offset as usize))
}

#[rstest]
#[case::ahead(LazyRam::options())]
#[case::on_demand(on_demand())]
#[case::a_page_a_fault(on_demand().fault_around(1))]
#[case::many_pages_a_fault(on_demand().fault_around(MIB + 1))]
fn threads_touching_random_pages_read_the_images_bytes(#[case] options: LazyRamOptions) {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let ram = options.start(open_chain(&images)).unwrap();
    std::thread::scope(|scope| {
        for seed in 1..=4 {
            let (ram, images) = (&ram, &images);
            scope.spawn(move || {
                let mut random = Random::seeded(seed);
                for _ in 0..2000 {
                    let offset = random.below(ram.ram_size() - 100);
                    let mut bytes = [0xee; 100];
                    ram.read_at(offset, &mut bytes).unwrap();
                    assert!(bytes == images.ram[offset as usize..][..100], "{offset:#x}");
                }
            });
        }
    });
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    assert_eq!(
        whole(&ram, ram.ram_size() as usize),
        whole(&open_chain(&images), ram.ram_size() as usize)
    );
    let progress = ram.progress();
    assert_eq!(progress.done, progress.total);
}

#[rstest]
#[case::by_default(on_demand())]
#[case::as_requested(on_demand().fault_around(16 * PAGE))]
fn a_fault_fills_the_aligned_block_around_its_page(#[case] options: LazyRamOptions) {
    needs!(Userfaultfd);
    const BLOCK: u64 = 16 * PAGE;
    let images = Images::new(MIB, PAGE).with([0..256]);
    let ram = options.start(open_chain(&images)).unwrap();
    let faults_of = |offset| {
        let before = ram.faults();
        page(&ram, offset).unwrap();
        ram.faults() - before
    };
    for (block, touched) in [(1, 1), (5, 8), (9, 15)] {
        let block = block * BLOCK;
        assert_eq!(faults_of(block + touched * PAGE), 1);
        for page in 0..16 {
            assert_eq!(faults_of(block + page * PAGE), 0, "{page} of {block:#x}");
        }
        assert_eq!(faults_of(block + BLOCK), 1);
    }
}

#[test]
fn prefetch_does_not_overwrite_guest_writes() {
    needs!(Userfaultfd);
    let mut images = full_and_two_diffs();
    let before = std::fs::read(images.path(0)).unwrap();
    let ram = LazyRam::options().start(open_chain(&images)).unwrap();
    for offset in (0..ram.ram_size() as usize)
        .rev()
        .step_by(3 * PAGE as usize)
    {
        // SAFETY: inside the memory, which nothing else accesses at the time.
        unsafe { ram.as_ptr().add(offset).write(99) };
        images.ram[offset] = 99;
    }
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    assert!(std::fs::read(images.path(0)).unwrap() == before);
}

#[test]
fn completed_memory_is_ordinary_memory() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let ram = LazyRam::options().start(open_chain(&images)).unwrap();
    let address = ram.as_ptr().addr();
    ram.wait().unwrap();
    let faults = ram.faults();
    images.cut(0, 0);
    // Zeros are in no image, so these pages were never filled.
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    assert_eq!(ram.faults(), faults);
    assert!(!flags(address).contains(&"um".to_owned()));
    assert!(!flags(address).contains(&"dc".to_owned()));
    assert!(ram.error().is_none());
}

/// A child would find zeros in missing pages.
#[test]
fn forked_child_does_not_inherit_incomplete_memory() {
    needs!(Userfaultfd);
    let ram = on_demand()
        .start(open_chain(&full_and_two_diffs()))
        .unwrap();
    assert!(flags(ram.as_ptr().addr()).contains(&"dc".to_owned()));
}

/// The child has every descriptor of this process.
#[rstest]
#[case::while_it_is_filled(false)]
#[case::when_all_is_in(true)]
fn surviving_forked_child_does_not_block_filling(#[case] all_in: bool) {
    needs!(Userfaultfd);
    let ram = on_demand()
        .start(open_chain(&full_and_two_diffs()))
        .unwrap();
    // SAFETY: the child makes system calls only.
    let child = unsafe { nix::unistd::fork() }.unwrap();
    let nix::unistd::ForkResult::Parent { child } = child else {
        nix::unistd::alarm::set(120);
        loop {
            nix::unistd::pause();
        }
    };
    let (ended, dropped) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let result = if all_in { ram.wait() } else { Ok(()) };
        drop(ram);
        ended.send(result).unwrap();
    });
    let result = dropped.recv_timeout(Duration::from_secs(60));
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
    nix::sys::wait::waitpid(child, None).unwrap();
    result.expect("it was dropped").unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(12, 24)))]

    /// Includes pages smaller than the host's, and RAM that ends inside a page of the host.
    #[test]
    fn any_chain_is_filled_completely(
        page in prop::sample::select(vec![512, 4096, 16384_u64]),
        pages in 1..300_u64,
        layers in prop::collection::vec(prop::collection::vec((0..300_u64, 1..60_u64), 0..12), 1..4),
        touched in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        prefetch in any::<bool>(),
        record in any::<bool>(),
    ) {
        needs!(Userfaultfd => Ok(()));
        let mut images = Images::new(pages * page, page);
        for runs in layers {
            images = images.with(runs.into_iter().map(|(start, len)| start.min(pages)..pages.min(start + len)));
        }
        let options = LazyRam::options().prefetch(prefetch).record(record);
        let ram = options.start(open_chain(&images)).unwrap();
        for index in touched {
            let offset = index.index(ram.ram_size() as usize);
            let mut byte = [0];
            ram.read_at(offset as u64, &mut byte).unwrap();
            prop_assert_eq!(byte[0], images.ram[offset]);
        }
        ram.wait().unwrap();
        prop_assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
        prop_assert!(ram.read_at(ram.ram_size(), &mut [0]).is_err());
        prop_assert!(ram.host_memory(ram.ram_size(), 1).is_none());
    }
}

#[test]
fn unreadable_page_is_an_error_and_never_zeros() {
    needs!(Userfaultfd);
    let images = Images::new(MIB, PAGE).with([0..256]);
    let ram = on_demand().start(open_chain(&images)).unwrap();
    // In the middle of the range that one fault fills.
    images.cut(0, 35 * PAGE);
    assert!(page(&ram, 34 * PAGE).unwrap() == images.ram[34 * PAGE as usize..][..4096]);
    assert!(
        ram.error().is_none(),
        "unrequested neighbors are no error yet"
    );
    for _ in 0..2 {
        assert_unreadable(page(&ram, 35 * PAGE));
    }
    let error = ram.error().unwrap();
    assert!(
        matches!(error, LazyError::Read(ReadImageError::Read { path, offset, .. }) if path == images.path(0) && *offset == 35 * PAGE),
        "{error:?}"
    );
    assert!(ram.wait().is_err());
    assert_unreadable(page(&ram, 200 * PAGE));
    assert!(page(&ram, 3 * PAGE).unwrap() == images.ram[3 * PAGE as usize..][..4096]);
}

#[test]
fn prefetch_read_error_is_reported_and_pages_are_not_zeros() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    // `wait` prefetches.
    let ram = on_demand().start(open_chain(&images)).unwrap();
    images.cut(2, 2000 * PAGE);
    let error = ram.wait().unwrap_err();
    assert!(
        matches!(&*error, LazyError::Read(ReadImageError::Read { path, .. }) if path == images.path(2)),
        "{error:?}"
    );
    assert_unreadable(page(&ram, 2001 * PAGE));
    assert_unreadable(page(&ram, 3299 * PAGE));
    for other in [1000, 2003, 3100, 4095] {
        assert!(page(&ram, other * PAGE).unwrap() == images.ram[(other * PAGE) as usize..][..4096]);
    }
}

#[rstest]
#[case::ahead(LazyRam::options())]
#[case::on_demand(on_demand())]
fn adopted_regions_are_filled(#[case] options: LazyRamOptions) {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let regions = Regions::new(&[5 * MIB + 4096, 11 * MIB - 4096]);
    let ram = regions.adopt(options, open_chain(&images)).unwrap();
    assert_eq!(ram.as_ptr(), regions.0[0].0);
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    ram.wait().unwrap();
    drop(ram);
    let last = regions.0[1].0.wrapping_add(11 * MIB as usize - 8192);
    assert!(page_at(last).unwrap() == images.ram[16 * MIB as usize - 4096..]);
}

#[test]
fn incomplete_adopted_memory_is_inaccessible_after_drop() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let regions = Regions::new(&[5 * MIB, 11 * MIB]);
    let ram = regions.adopt(on_demand(), open_chain(&images)).unwrap();
    page(&ram, 0).unwrap();
    drop(ram);
    for (start, _) in &regions.0 {
        assert_unreadable(page_at(*start));
    }
}

#[test]
fn memory_that_cannot_be_filled_is_refused_unchanged() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let regions = Regions::new(&[5 * MIB, 10 * MIB]);
    let error = regions.adopt(on_demand(), open_chain(&images)).unwrap_err();
    assert!(
        matches!(error, LazyError::TargetSize { target, .. } if target == 15 * MIB),
        "{error:?}"
    );

    let regions = Regions::new(&[5 * MIB, 11 * MIB]);
    let _first = regions.adopt(on_demand(), open_chain(&images)).unwrap();
    let error = regions.adopt(on_demand(), open_chain(&images)).unwrap_err();
    assert!(
        matches!(
            error,
            LazyError::Userfaultfd(UserfaultfdError::Register { .. })
        ),
        "{error:?}"
    );
    assert!(page_at(regions.0[1].0).unwrap() == images.ram[5 * MIB as usize..][..4096]);
}

#[test]
fn lazy_ram_may_be_dropped_at_any_time() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let chain = Arc::new(open_chain(&images));
    for round in (0..100).step_by(rounds(7, 1)) {
        let ram = LazyRam::options().start(Arc::clone(&chain)).unwrap();
        if round % 2 == 0 {
            page(&ram, (round * 40) * PAGE).unwrap();
        }
        std::thread::sleep(Duration::from_micros(round * 50));
    }
}

/// On Linux with per-mapping locks, a thread that faults while the memory is being unregistered may
/// sleep on, unless it is woken afterwards.
#[test]
fn no_access_hangs_while_the_last_page_is_filled() {
    needs!(Userfaultfd);
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let chain = Arc::new(open_chain(&Images::new(MIB, PAGE).with([0..1])));
        for _ in 0..rounds(200, 3000) {
            let ram = LazyRam::options().start(Arc::clone(&chain)).unwrap();
            for offset in (0..ram.ram_size()).step_by(4096) {
                ram.read_at(offset, &mut [0]).unwrap();
            }
        }
        done.send(()).unwrap();
    });
    // The thread would never end, so the test cannot join it.
    finished.recv_timeout(Duration::from_secs(120)).unwrap();
}
